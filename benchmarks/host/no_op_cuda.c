/* A CUDA runtime, driver and cuBLAS that do nothing, for timing what the host does to queue a step.
 *
 * Preloaded, it takes the place of the libraries that torch and Triton call. Kernels and products are counted and not
 * run; memory is reserved, never touched by them; only small copies between host and "device" are made. Functions that
 * are not here are made from the undefined symbols of torch's libraries, and return 0 (see `no_op_cuda.py`).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <driver_types.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define COPIED (1 << 20) /* bytes: larger copies are not made */
#define MEMORY ((size_t)140 << 30)
#define CAPTURE_INVALID 900 /* cudaErrorStreamCaptureUnsupported */

/* Read by Python: kernels and products, copies, allocations, waits for the device, and those while capturing. */
long no_op_launches, no_op_copies, no_op_mallocs, no_op_waits, no_op_captured, no_op_captured_copies,
  no_op_replays;
static int arch = 80, multiprocessors = 108;
static unsigned long long capture; /* number of the running capture, or 0 */
static unsigned long long captures;
static void *captured_stream;

__attribute__((constructor)) static void start(void) {
  const char *given = getenv("NO_OP_ARCH");
  if (given && atoi(given) >= 90) arch = atoi(given), multiprocessors = 132;
}

static int launched(void) {
  no_op_launches++;
  if (capture) no_op_captured++;
  return 0;
}

static void *handle(void) { return calloc(1, 256); }

/* Devices */
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaMemGetInfo(size_t *unused, size_t *all) { *unused = *all = MEMORY; return 0; }
int cudaDeviceCanAccessPeer(int *can) { *can = 0; return 0; }
int cudaDeviceGetPCIBusId(char *id, int n) { strncpy(id, "0000:00:00.0", n); return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0, *greatest = -5; return 0; }
const char *cudaGetErrorString(int e) { return e == CAPTURE_INVALID ? "not permitted while capturing" : "no error"; }
const char *cudaGetErrorName(int e) { return "cudaError"; }

int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "no-op GPU");
  p->major = arch / 10, p->minor = arch % 10;
  p->totalGlobalMem = MEMORY, p->multiProcessorCount = multiprocessors;
  p->warpSize = 32, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->l2CacheSize = 50 << 20;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = arch < 90 ? 166912 : 232448;
  p->sharedMemPerMultiprocessor = arch < 90 ? 167936 : 233472;
  p->unifiedAddressing = p->canMapHostMemory = p->concurrentKernels = 1;
  return 0;
}

static int attribute(int *value, int which) {
  switch (which) { /* cudaDeviceAttr and CUdevice_attribute agree */
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrMultiProcessorCount: *value = multiprocessors; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = arch / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = arch % 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = arch < 90 ? 167936 : 233472; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = arch < 90 ? 166912 : 232448; break;
    default: *value = 0;
  }
  return 0;
}
int cudaDeviceGetAttribute(int *value, int which, int device) { return attribute(value, which); }
int cuDeviceGetAttribute(int *value, int which, int device) { return attribute(value, which); }

/* Memory */
static int reserve(void **p, size_t n) {
  no_op_mallocs++;
  *p = mmap(NULL, n ? n : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return *p == MAP_FAILED ? 2 : 0;
}
int cudaMalloc(void **p, size_t n) { return reserve(p, n); }
int cudaMallocAsync(void **p, size_t n, void *stream) { return reserve(p, n); }

static struct { char *begin, *end; } pinned[4096];
static int pins;
int cudaHostAlloc(void **p, size_t n, unsigned flags) {
  int error = reserve(p, n);
  if (!error && pins < 4096) pinned[pins].begin = *p, pinned[pins++].end = (char *)*p + n;
  return error;
}
static int is_pinned(const void *p) {
  for (int i = 0; i < pins; i++)
    if ((const char *)p >= pinned[i].begin && (const char *)p < pinned[i].end) return 1;
  return 0;
}
int cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  a->type = is_pinned(p) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->devicePointer = a->hostPointer = (void *)p;
  return 0;
}
static int copy(void *to, const void *from, size_t n, int kind) {
  no_op_copies++;
  int host = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToHost;
  if (capture && host) {
    no_op_captured_copies++;
    if (!is_pinned(kind == cudaMemcpyHostToDevice ? from : to)) return CAPTURE_INVALID;
  }
  if (host && n <= COPIED) memcpy(to, from, n);
  return 0;
}
int cudaMemcpy(void *to, const void *from, size_t n, int kind) {
  no_op_waits++;
  return capture ? CAPTURE_INVALID : copy(to, from, n, kind);
}
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream) {
  if (kind == cudaMemcpyDeviceToDevice) launched();
  return copy(to, from, n, kind);
}
int cudaMemsetAsync(void *p, int value, size_t n, void *stream) { return launched(); }

/* Streams, events, waits */
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = handle(); return 0; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { *stream = handle(); return 0; }
int cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = handle(); return 0; }
int cudaEventCreate(void **event) { *event = handle(); return 0; }
int cudaEventDestroy(void *event) { free(event); return 0; }
int cudaEventElapsedTime(float *ms, void *start, void *end) { *ms = 1; return 0; }
static int waited(void) { no_op_waits++; return capture ? CAPTURE_INVALID : 0; }
int cudaStreamSynchronize(void *stream) { return waited(); }
int cudaDeviceSynchronize(void) { return waited(); }
int cudaEventSynchronize(void *event) { return waited(); }

/* CUDA graphs: what is queued on the stream meanwhile is counted, nothing is recorded */
int cudaStreamBeginCapture(void *stream, int mode) {
  capture = ++captures, captured_stream = stream;
  return 0;
}
int cudaStreamEndCapture(void *stream, void **graph) { capture = 0; *graph = handle(); return 0; }
int cudaStreamIsCapturing(void *stream, int *status) {
  *status = capture && stream == captured_stream;
  return 0;
}
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void **graph, const void ***needs,
                             const void ***edges, size_t *n) {
  static char recorded;
  cudaStreamIsCapturing(stream, status);
  if (id) *id = capture;
  if (graph) *graph = &recorded;
  if (needs) *needs = NULL;
  if (edges) *edges = NULL;
  if (n) *n = 0;
  return 0;
}
int cudaThreadExchangeStreamCaptureMode(int *mode) { *mode = cudaStreamCaptureModeRelaxed; return 0; }
int cudaGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long flags) { *exec = handle(); return 0; }
int cudaGraphGetNodes(void *graph, void *nodes, size_t *n) { *n = 1; return 0; }
int cudaGraphLaunch(void *exec, void *stream) { no_op_replays++; return 0; }

/* Launches */
int cudaLaunchKernel(const void *f, ...) { return launched(); }
int __cudaLaunchKernel(const void *f, ...) { return launched(); }
int cudaLaunchKernelExC(const void *config, ...) { return launched(); }
int cuLaunchKernel(void *f, ...) { return launched(); }
int cuLaunchKernelEx(const void *config, ...) { return launched(); }
int cuLaunchCooperativeKernel(void *f, ...) { return launched(); }
int cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->ptxVersion = a->binaryVersion = arch;
  a->maxDynamicSharedSizeBytes = 49152;
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, ...) { *n = 2; return 0; }
int __cudaGetKernel(void **kernel, const void *f) { *kernel = (void *)f; return 0; }
static int unavailable(void) { return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                     int *status) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (!*f) *f = (void *)unavailable;
  if (status) *status = 0;
  return 0;
}

/* The driver, for Triton */
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetCurrent(void **context) { static char primary; *context = &primary; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxSetLimit(int limit, size_t n) { return 0; }
int cuCtxGetLimit(size_t *n, int limit) { *n = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return cuCtxGetCurrent(context); }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0, *active = 1; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "error"; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = handle(); return 0; }
int cuModuleLoadDataEx(void **module, const void *image, ...) { *module = handle(); return 0; }
int cuModuleLoad(void **module, const char *file) { *module = handle(); return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **f, void *module, const char *name) { *f = handle(); return 0; }
int cuFuncSetAttribute(void *f, int which, int value) { return 0; }
int cuFuncSetCacheConfig(void *f, int config) { return 0; }
int cuFuncGetAttribute(int *value, int which, void *f) {
  *value = which == 0 ? 1024 : which == 4 ? 32 : 0; /* threads, registers */
  return 0;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, ...) { *n = 2; return 0; }
int cuOccupancyMaxActiveClusters(int *n, ...) { *n = multiprocessors; return 0; }
int cuPointerGetAttribute(void *value, int which, size_t p) { *(size_t *)value = p; return 0; }
int cuPointerGetAttributes(unsigned n, int *which, void **values, size_t p) {
  for (unsigned i = 0; i < n; i++) *(size_t *)values[i] = p;
  return 0;
}
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }

/* cuBLAS */
int cublasCreate_v2(void **h) { *h = handle(); return 0; }
int cublasGetMathMode(void *h, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *h, int *mode) { *mode = 0; return 0; }
int cublasGemmEx(void *h, ...) { return launched(); }
int cublasSgemm_v2(void *h, ...) { return launched(); }
int cublasDgemm_v2(void *h, ...) { return launched(); }
int cublasGemmStridedBatchedEx(void *h, ...) { return launched(); }
int cublasSgemmStridedBatched(void *h, ...) { return launched(); }
int cublasDgemmStridedBatched(void *h, ...) { return launched(); }
int cublasLtCreate(void **h) { *h = handle(); return 0; }
size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtMatmul(void *h, ...) { return launched(); }
int cublasLtMatmulDescCreate(void **d, ...) { *d = handle(); return 0; }
int cublasLtMatrixLayoutCreate(void **d, ...) { *d = handle(); return 0; }
int cublasLtMatmulPreferenceCreate(void **p) { *p = handle(); return 0; }
int cublasLtMatmulDescDestroy(void *d) { free(d); return 0; }
int cublasLtMatrixLayoutDestroy(void *d) { free(d); return 0; }
int cublasLtMatmulPreferenceDestroy(void *p) { free(p); return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *a, void *b, void *c, void *e, void *p, int n, void *results,
                                   int *found) {
  *found = 1;
  return 0;
}
