#include <cuda_runtime_api.h>

#include "cuda_info.hpp"

namespace pymcip {

CudaInfo cuda_info() {
    CudaInfo info;
    cudaRuntimeGetVersion(&info.runtime_version);
    cudaDriverGetVersion(&info.driver_version);
    int count = 0;
    if (const cudaError_t status = cudaGetDeviceCount(&count); status != cudaSuccess) {
        info.error = cudaGetErrorString(status);
        return info;
    }
    for (int device = 0; device < count; ++device) {
        cudaDeviceProp found;
        if (const cudaError_t status = cudaGetDeviceProperties(&found, device);
            status != cudaSuccess) {
            info.error = cudaGetErrorString(status);
            break;
        }
        info.devices.push_back({found.name, found.major, found.minor, found.multiProcessorCount,
                                static_cast<std::int64_t>(found.totalGlobalMem),
                                found.l2CacheSize});
    }
    return info;
}

}  // namespace pymcip
