// Run by test_instruction_sets.py: top-k without Python, for other processors. Prints the kernels
// to stderr, and a line per case, the same for every kernel and processor, to stdout.

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../csrc/topk.hpp"

namespace {

std::vector<float> numbers(std::int64_t count, std::uint32_t state) {
    std::vector<float> found(static_cast<std::size_t>(count));
    for (float& number : found) {
        state = state * 1664525u + 1013904223u;
        number = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    }
    return found;
}

std::uint64_t digest(const void* data, std::size_t bytes) {  // FNV-1a
    std::uint64_t hash = 14695981039346656037ull;
    for (std::size_t i = 0; i < bytes; ++i)
        hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211ull;
    return hash;
}

}  // namespace

int main() {
    struct Case {
        std::int64_t queries, rows, columns, k;
        int threads;
    };
    constexpr Case cases[] = {{1, 1, 1, 1, 1}, {3, 33, 63, 5, 1}, {40, 1500, 200, 3, 2},
                              {300, 700, 65, 40, 2}, {2, 300, 4096, 7, 2}};
    for (const std::string& kernel : pymcip::topk_cpu_kernels()) {
        std::fprintf(stderr, "%s\n", kernel.c_str());
        for (const Case& one : cases)
            for (const bool exact : {true, false}) {
                const std::vector<float> queries = numbers(one.queries * one.columns, 1);
                std::vector<float> rows = numbers(one.rows * one.columns, 2);
                std::memcpy(&rows.back(), &rows.front(), sizeof(float));
                const auto matrix = [&](const std::vector<float>& values, std::int64_t count) {
                    return pymcip::Matrix{values.data(), pymcip::Scalar::float32, count,
                                          one.columns, one.columns, 1};
                };
                const auto places = static_cast<std::size_t>(one.queries * one.k);
                std::vector<std::int64_t> ids(places);
                std::vector<float> scores(places);
                const pymcip::Outcome outcome = pymcip::topk_cpu(
                    matrix(queries, one.queries), {{matrix(rows, one.rows), {}}}, one.k, -1.0f,
                    exact, one.threads, kernel, ids.data(), scores.data(),
                    [](std::int64_t, std::int64_t) { return true; });
                if (outcome.kind != pymcip::Outcome::Kind::complete) return 1;
                std::printf("%lld x %lld, D = %lld, k = %lld, %s: %016llx %016llx\n",
                            static_cast<long long>(one.queries), static_cast<long long>(one.rows),
                            static_cast<long long>(one.columns), static_cast<long long>(one.k),
                            exact ? "exact" : "screen",
                            static_cast<unsigned long long>(digest(ids.data(), places * 8)),
                            static_cast<unsigned long long>(digest(scores.data(), places * 4)));
            }
    }
    return 0;
}
