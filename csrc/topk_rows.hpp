// Rows of a matrix, as floats and packed; for topk_cpu.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "topk.hpp"
#include "topk_kernel.hpp"

namespace pymcip {

struct AlignedDelete {
    void operator()(void* data) const { ::operator delete[](data, std::align_val_t(64)); }
};
template <class T>
using Buffer = std::unique_ptr<T[], AlignedDelete>;

template <class T>
Buffer<T> allocate(std::int64_t count) {
    const auto bytes = static_cast<std::size_t>(std::max<std::int64_t>(count, 1)) * sizeof(T);
    return Buffer<T>(static_cast<T*>(::operator new[](bytes, std::align_val_t(64))));
}

inline std::int64_t divide_up(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

inline std::int64_t scalar_bytes(Scalar scalar) { return scalar == Scalar::float32 ? 4 : 2; }

inline const char* row_address(const Matrix& matrix, std::int64_t row) {
    return static_cast<const char*>(matrix.data) +
           row * matrix.row_stride * scalar_bytes(matrix.scalar);
}

inline void widen(const Kernel& kernel, Scalar scalar, const void* data, std::int64_t count,
                  float* out) {
    switch (scalar) {
        case Scalar::float32:
            std::memcpy(out, data, static_cast<std::size_t>(count) * sizeof(float));
            break;
        case Scalar::float16:
            kernel.widen_half(static_cast<const std::uint16_t*>(data), count, out);
            break;
        case Scalar::bfloat16:
            kernel.widen_bfloat(static_cast<const std::uint16_t*>(data), count, out);
    }
}

inline void copy_row(const Kernel& kernel, const Matrix& matrix, std::int64_t row, float* out) {
    const char* data = row_address(matrix, row);
    if (matrix.column_stride == 1 || matrix.columns == 1)
        return widen(kernel, matrix.scalar, data, matrix.columns, out);
    const std::int64_t step = matrix.column_stride * scalar_bytes(matrix.scalar);
    alignas(4) char gathered[256];
    for (std::int64_t first = 0; first < matrix.columns; first += 64) {
        const std::int64_t count = std::min<std::int64_t>(64, matrix.columns - first);
        const auto bytes = static_cast<std::size_t>(scalar_bytes(matrix.scalar));
        for (std::int64_t i = 0; i < count; ++i)
            std::memcpy(gathered + static_cast<std::size_t>(i) * bytes, data + (first + i) * step,
                        bytes);
        widen(kernel, matrix.scalar, gathered, count, out + first);
    }
}

// The row itself where it lies, if it is one of contiguous floats; else a copy in `space`.
inline const float* row_floats(const Kernel& kernel, const Matrix& matrix, std::int64_t row,
                               float* space) {
    if (matrix.scalar == Scalar::float32 && matrix.column_stride == 1)
        return reinterpret_cast<const float*>(row_address(matrix, row));
    copy_row(kernel, matrix, row, space);
    return space;
}

inline void prefetch_row(const Matrix& matrix, std::int64_t row) {
    if (matrix.column_stride != 1) return;
    const char* data = row_address(matrix, row);
    const std::int64_t bytes = matrix.columns * scalar_bytes(matrix.scalar);
    for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(data + i, 0, 2);
}

// ------------------------------------------------------------------------------------------------
// Packing

inline std::int64_t steps_of(const Kernel& kernel, std::int64_t columns) {
    return divide_up(columns, 64) * 64 * kernel.code_bytes / kStep;
}

struct PackSpace {
    explicit PackSpace(std::int64_t width)
        : rows(allocate<float>(kGroup * width)), codes(allocate<std::int8_t>(kGroup * width)) {}
    Buffer<float> rows;
    Buffer<std::int8_t> codes;
    float norms[kGroup];
};

// Packs the group that starts at row `first` as group `group` of `packed`. Returns a row that can't
// be packed, or -1.
inline std::int64_t pack_group(const Kernel& kernel, const Matrix& matrix, std::int64_t first,
                               std::int64_t group, const Packed& packed, PackSpace& space) {
    const std::int64_t steps = steps_of(kernel, matrix.columns), width = steps * kStep;
    const int count = static_cast<int>(std::min<std::int64_t>(kGroup, matrix.rows - first));
    for (int row = 0; row < count; ++row)
        copy_row(kernel, matrix, first + row, space.rows.get() + row * width);
    std::int32_t* sums = packed.sums + group * kGroup;
    std::fill(sums + count, sums + kGroup, 0);
    std::memset(space.codes.get() + count * width, 0,
                static_cast<std::size_t>((kGroup - count) * width));
    const int bad = kernel.encode(space.rows.get(), count, matrix.columns, steps, space.codes.get(),
                                  sums, packed.groups + group * kGroupFacts, space.norms);
    if (bad >= 0) return first + bad;
    std::int8_t* out = packed.codes + group * kGroup * width;
    for (int half = 0; half < 2; ++half)
        for (std::int64_t step = 0; step < steps; ++step)
            for (int row = 0; row < 16; ++row, out += kStep)
                std::memcpy(out, space.codes.get() + (half * 16 + row) * width + step * kStep, kStep);
    return -1;
}

}  // namespace pymcip
