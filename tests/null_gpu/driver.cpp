// The CUDA driver (libcuda.so.1), which Triton calls and torch looks for. Its kernels are operations of the runtime.
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#undef cuCtxCreate
#define API extern "C" __attribute__((visibility("default")))

// The runtime's functions, which are in the library that is preloaded.
template <typename Function>
static Function runtime(const char* name) {
    return (Function)dlsym(RTLD_DEFAULT, name);
}
static CUresult attribute(int* value, int which, int device) {  // they have the runtime's numbers
    return (CUresult) runtime<int (*)(int*, int, int)>("cudaDeviceGetAttribute")(value, which, device);
}
static CUresult launch(CUfunction f, CUstream s) {
    runtime<void (*)(CUstream, const char*)>("nullgpu_launch")(s, ((std::string*)f)->c_str());
    return CUDA_SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// Devices and contexts

API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int* version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGetCount(int* n) { return (CUresult) runtime<int (*)(int*)>("cudaGetDeviceCount")(n); }
API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGetName(char* name, int size, CUdevice) {
    snprintf(name, size, "Null GPU");
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
    return attribute(value, which, device);
}
API CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = (CUcontext)0x10;
    return CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
API CUresult cuCtxGetLimit(size_t* value, CUlimit) {
    *value = 0;
    return CUDA_SUCCESS;
}
API CUresult cuCtxGetDevice(CUdevice* device) {
    return (CUresult) runtime<int (*)(int*)>("cudaGetDevice")(device);
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return cuCtxGetCurrent(context); }
API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    *flags = 0;
    *active = runtime<int (*)(int)>("nullgpu_has_context")(device);
    return CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult, const char** text) {
    *text = "error of the null driver";
    return CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr p) {
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *(CUdeviceptr*)value = p;
    else
        *(int*)value = 0;
    return CUDA_SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// Modules and kernels; a function is its name

API CUresult cuModuleLoadData(CUmodule* module, const void*) {
    *module = (CUmodule)malloc(8);
    return CUDA_SUCCESS;
}
API CUresult cuModuleLoadDataEx(CUmodule* module, const void* data, unsigned, CUjit_option*, void**) {
    return cuModuleLoadData(module, data);
}
API CUresult cuModuleLoad(CUmodule* module, const char*) { return cuModuleLoadData(module, nullptr); }
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction* f, CUmodule, const char* name) {
    *f = (CUfunction) new std::string(name);
    return CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
    *value = which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
API CUresult cuLaunchKernel(CUfunction f, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                            CUstream s, void**, void**) {
    return launch(f, s);
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction f, void**, void**) {
    return launch(f, config->hStream);
}
API CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                       unsigned, CUstream s, void**) {
    return launch(f, s);
}
API CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) {
    *n = 1;
    return CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int, size_t) {
    *n = 2;
    return CUDA_SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// Functions by name; those that are not here do nothing

static CUresult nothing() { return CUDA_SUCCESS; }
API CUresult cuGetProcAddress_v2(const char* name, void** f, int, cuuint64_t, CUdriverProcAddressQueryResult* result) {
    void* found = dlsym(RTLD_DEFAULT, name);
    *f = found ? found : (void*)nothing;
    if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
    return CUDA_SUCCESS;
}
