// What the CUDA runtime built into this extension sees. Versions are CUDA's own numbers,
// 1000 * major + 10 * minor; `error` is empty if the devices could be listed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pymcip {

struct CudaDevice {
    std::string name;
    int capability_major;
    int capability_minor;
    int multiprocessors;
    std::int64_t memory_bytes;
    std::int64_t l2_bytes;
};

struct CudaInfo {
    int runtime_version = 0;
    int driver_version = 0;  // 0: no driver
    std::string error;
    std::vector<CudaDevice> devices;
};

CudaInfo cuda_info();

}  // namespace pymcip
