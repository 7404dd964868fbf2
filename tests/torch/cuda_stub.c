/* A CUDA driver that does nothing but write launches down, so that Triton's own launchers run
   without a GPU. A kernel's "function" is a number of its own. */

#include <stdint.h>
#include <string.h>

typedef int Result;

static unsigned char written[1 << 20];
static size_t length = 0;
static int sizes[64];
static int count = 0;

/* Bytes of each parameter of the launches to come; forgets those before. */
void stub_expect(int n, const int *bytes) {
  count = n;
  if (n) memcpy(sizes, bytes, n * sizeof(int));
  length = 0;
}
size_t stub_length(void) { return length; }
const unsigned char *stub_written(void) { return written; }

static void put(const void *from, size_t bytes) {
  if (length + bytes <= sizeof written) {
    memcpy(written + length, from, bytes);
    length += bytes;
  }
}

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned attribute_count;
} Config;

Result cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  put(config->grid, sizeof config->grid);
  put(&config->block[0], sizeof(unsigned));
  put(&config->stream, sizeof(void *));
  put(&function, sizeof(void *));
  for (int i = 0; i < count; i++) put(parameters[i], sizes[i]);
  return 0;
}

/* Not what the hardware reads, but made of all that it depends on. */
Result cuTensorMapEncodeTiled(uint64_t *map, int type, uint32_t rank, uint64_t address,
                              const uint64_t *shape, const uint64_t *strides, const uint32_t *box,
                              const uint32_t *steps, int interleave, int swizzle, int l2,
                              int fill) {
  memset(map, 0, 128);
  uint64_t *next = map;
  *next++ = address;
  *next++ = type;
  *next++ = swizzle;
  *next++ = fill;
  for (uint32_t i = 0; i < rank; i++) {
    *next++ = shape[i];
    *next++ = box[i];
    if (i + 1 < rank) *next++ = strides[i];
  }
  return 0;
}

Result cuModuleLoadData(uintptr_t *module, const void *data) {
  static uintptr_t next = 4096;
  *module = next += 16;
  return 0;
}
Result cuModuleGetFunction(uintptr_t *function, uintptr_t module, const char *name) {
  *function = module;
  return 0;
}
Result cuModuleUnload(void *module) { return 0; }
Result cuFuncGetAttribute(int *value, int attribute, void *function) { *value = 1024; return 0; }
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t pointer) {
  *value = pointer;
  return 0;
}
Result cuInit(unsigned flags) { return 0; }
Result cuGetErrorString(Result error, const char **text) { *text = "stub"; return 0; }
Result cuDeviceGet(int *device, int i) { *device = i; return 0; }
Result cuDeviceGetCount(int *n) { *n = 1; return 0; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { *context = &length; return 0; }
Result cuDriverGetVersion(int *version) { *version = 12080; return 0; }
Result cuCtxGetCurrent(void **context) { *context = &length; return 0; }
Result cuCtxSetCurrent(void *context) { return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
Result cuOccupancyMaxActiveClusters(int *n, void *function, void *config) { *n = 1; return 0; }
Result cuTensorMapEncodeIm2col(void) { return 1; }
