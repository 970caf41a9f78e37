/* The few functions of the CANN runtime whose results torch_npu looks at. Device memory is host memory, one device is there,
   streams and events are empty, and no operator computes anything. Every other symbol is generated to return 0. */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MEMORY_BYTES (64ul << 30)
#define FREE_BYTES (60ul << 30)
#define NUM_CORES 24

static __thread int32_t current_device = 0;
static int context;
static uint32_t num_models, *captured_model;

/* devices */
int aclrtGetDeviceCount(uint32_t *count) { *count = 1; return 0; }
int aclrtGetDevice(int32_t *device) { *device = current_device; return 0; }
int aclrtSetDevice(int32_t device) { current_device = device; return 0; }
int aclrtGetCurrentContext(void **out) { *out = &context; return 0; }
const char *aclrtGetSocName(void) { return "Ascend910B3"; }
const char *aclGetRecentErrMsg(void) { return "no CANN here, only a stub"; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t a, int32_t b) { *can = 0; return 0; }
int aclGetDeviceCapability(uint32_t device, int what, int64_t *value) { *value = NUM_CORES; return 0; }
int aclrtGetDeviceInfo(uint32_t device, int what, int64_t *value) { *value = NUM_CORES; return 0; }

/* memory */
static int allocate(void **out, size_t bytes) { *out = NULL; return posix_memalign(out, 512, bytes ? bytes : 512); }
int aclrtMalloc(void **out, size_t bytes, int policy) { return allocate(out, bytes); }
int aclrtMallocAlign32(void **out, size_t bytes, int policy) { return allocate(out, bytes); }
int aclrtMallocWithCfg(void **out, size_t bytes, int policy, void *config) { return allocate(out, bytes); }
int aclrtMallocHost(void **out, size_t bytes) { return allocate(out, bytes); }
int aclrtMallocHostWithCfg(void **out, size_t bytes, void *config) { return allocate(out, bytes); }
int aclrtFree(void *memory) { free(memory); return 0; }
int aclrtFreeHost(void *memory) { free(memory); return 0; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) { memcpy(to, from, bytes); return 0; }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) {
  memcpy(to, from, bytes);
  return 0;
}
int aclrtMemset(void *to, size_t room, int value, size_t bytes) { memset(to, value, bytes); return 0; }
int aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total_bytes) {
  *free_bytes = FREE_BYTES;
  *total_bytes = MEMORY_BYTES;
  return 0;
}

/* streams, events, capture: handles that are never looked into */
static int handle(void **out) { *out = malloc(64); return 0; }
int aclrtCreateStream(void **out) { return handle(out); }
int aclrtCreateStreamWithConfig(void **out, uint32_t priority, uint32_t flags) { return handle(out); }
int aclrtCreateEvent(void **out) { return handle(out); }
int aclrtCreateEventWithFlag(void **out, uint32_t flags) { return handle(out); }
int aclrtCreateEventExWithFlag(void **out, uint32_t flags) { return handle(out); }
int aclrtEventElapsedTime(float *milliseconds, void *a, void *b) { *milliseconds = 0; return 0; }
/* a captured model holds its number; torch_npu finds captures by it */
int aclmdlRICaptureBegin(void *stream, int mode) {
  handle((void **)&captured_model);
  *captured_model = ++num_models;
  return 0;
}
int aclmdlRIGetId(void *model, uint32_t *id) { *id = *(uint32_t *)model; return 0; }
int aclmdlRICaptureEnd(void *stream, void **model) { *model = captured_model; captured_model = NULL; return 0; }
int aclmdlRICaptureGetInfo(void *stream, int *status, void **model) {
  *status = captured_model != NULL;
  *model = captured_model;
  return 0;
}

/* options, and the bounds-checked C library that CANN brings */
size_t aclGetCompileoptSize(int option) { return 256; }
int aclGetCompileopt(int option, char *value, size_t room) { if (room) value[0] = 0; return 0; }
int vsnprintf_s(char *to, size_t room, size_t count, const char *format, va_list arguments) {
  return vsnprintf(to, room, format, arguments);
}
int snprintf_s(char *to, size_t room, size_t count, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(to, room, format, arguments);
  va_end(arguments);
  return length;
}
int strcpy_s(char *to, size_t room, const char *from) { strncpy(to, from, room); return 0; }
