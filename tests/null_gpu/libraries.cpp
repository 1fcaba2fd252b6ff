// cuBLAS and cuDNN: what they compute is one operation of the stream that their handle has. cuDNN's descriptors are
// those of the real library; functions that are not here do nothing and return 0 (see build.py).
#include "device.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

// ---------------------------------------------------------------------------------------------------------------------
// Handles

static std::unordered_map<void*, cudaStream_t> stream_of_handle;

static int create(void** handle) {
    *handle = calloc(1, 256);
    return 0;
}
static int set_stream(void* handle, cudaStream_t s) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    stream_of_handle[handle] = s;
    return 0;
}
static int compute(void* handle, const char* name) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    return submit(stream_of_handle[handle], {"kernel", name}) ? 14 : 0;  // 14: an internal error
}
#define COMPUTES(function) \
    API int function(void* handle, ...) { return compute(handle, #function); }

API int cublasCreate_v2(void** handle) { return create(handle); }
API int cublasLtCreate(void** handle) { return create(handle); }
API int cudnnCreate(void** handle) { return create(handle); }
API int cublasDestroy_v2(void*) { return 0; }
API int cudnnDestroy(void*) { return 0; }
API int cublasSetStream_v2(void* handle, cudaStream_t s) { return set_stream(handle, s); }
API int cudnnSetStream(void* handle, cudaStream_t s) { return set_stream(handle, s); }
API int cudnnGetStream(void* handle, cudaStream_t* s) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    *s = stream_of_handle[handle];
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// cuBLAS

API int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0; }
API int cublasGetMathMode(void*, int* mode) { return *mode = 0; }
COMPUTES(cublasSgemm_v2)
COMPUTES(cublasDgemm_v2)
COMPUTES(cublasGemmEx)
COMPUTES(cublasSgemmEx)
COMPUTES(cublasGemmStridedBatchedEx)
COMPUTES(cublasSgemmStridedBatched)
COMPUTES(cublasDgemmStridedBatched)
COMPUTES(cublasSgemv_v2)
COMPUTES(cublasDgemv_v2)
COMPUTES(cublasSdot_v2)
COMPUTES(cublasDdot_v2)

API size_t cublasLtGetVersion() { return CUDART_VERSION >= 13000 ? 130100 : 120400; }
API int cublasLtMatmulDescCreate(void** descriptor, int, int) { return create(descriptor); }
API int cublasLtMatmulPreferenceCreate(void** preference) { return create(preference); }
API int cublasLtMatrixLayoutCreate(void** layout, int, unsigned long, unsigned long, long) { return create(layout); }
struct Heuristic {  // cublasLtMatmulHeuristicResult_t
    unsigned long algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, Heuristic* result,
                                       int* n) {
    memset(result, 0, sizeof *result);
    *n = 1;
    return 0;
}
API int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*,
                       void*, void*, void*, const void*, void*, size_t, cudaStream_t s) {
    return submit(s, {"kernel", "cublasLtMatmul"}) ? 14 : 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// cuDNN

API int cudnnBackendCreateDescriptor(int, void** descriptor) { return create(descriptor); }
API int cudnnBackendDestroyDescriptor(void* descriptor) {
    free(descriptor);
    return 0;
}
API int cudnnBackendFinalize(void*) { return 0; }
API int cudnnBackendSetAttribute(void*, int, int, long, const void*) { return 0; }
API int cudnnBackendGetAttribute(void*, int, int type, long wanted, long* count, void* values) {
    const int int64 = 3, descriptor = 15;
    if (type == int64 && values) memset(values, 0, wanted * sizeof(long));
    if (count) *count = type == int64 ? std::max(wanted, 1L) : type == descriptor;
    return 0;
}
API int cudnnBackendExecute(void* handle, void*, void*) { return compute(handle, "cudnnBackendExecute"); }
COMPUTES(cudnnBatchNormalizationBackwardEx)
COMPUTES(cudnnBatchNormalizationForwardTrainingEx)
COMPUTES(cudnnBatchNormalizationForwardInference)
COMPUTES(cudnnConvolutionForward)
COMPUTES(cudnnConvolutionBackwardData)
COMPUTES(cudnnConvolutionBackwardFilter)
COMPUTES(cudnnPoolingForward)
API int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*,
                                                                 size_t* size) {
    return *size = 0;
}
API int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*, void*,
                                                          void*, size_t* size) {
    return *size = 0;
}
API int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*, size_t* size) {
    return *size = 0;
}
