// CUDA's calls for virtual and pinned memory, over host memory, with the declarations of the real header. Memory
// that is not mapped cannot be touched, new memory is full of garbage, and every argument that the
// driver would refuse is refused.
#include <cuda.h>

#include <sys/mman.h>

#include <cstring>
#include <map>

namespace {
constexpr size_t kGranularity = 2 << 20;
constexpr int kDevice = 3;

struct Memory {
  size_t size;
  bool is_held, is_mapped;
};
struct Mapping {
  size_t size;
  CUmemGenericAllocationHandle handle;
};
std::map<CUmemGenericAllocationHandle, Memory> memories;
std::map<CUdeviceptr, Mapping> mappings;
std::map<CUdeviceptr, size_t> ranges;
std::map<void*, size_t> pinned;
CUmemGenericAllocationHandle newest = 100;
size_t capacity = SIZE_MAX;

size_t used() {
  size_t sum = 0;
  for (const auto& [handle, memory] : memories) sum += memory.size;
  return sum;
}

void drop_unreferenced(CUmemGenericAllocationHandle handle) {
  const Memory& memory = memories.at(handle);
  if (!memory.is_held && !memory.is_mapped) memories.erase(handle);
}

bool is_right(CUmemLocation location) {
  return location.type == CU_MEM_LOCATION_TYPE_DEVICE && location.id == kDevice;
}

bool is_right(const CUmemAllocationProp* properties) {
  const CUmemAllocationProp zeros = {};
  return properties->type == CU_MEM_ALLOCATION_TYPE_PINNED && is_right(properties->location) &&
         properties->requestedHandleTypes == CU_MEM_HANDLE_TYPE_NONE &&
         properties->win32HandleMetaData == nullptr &&
         !memcmp(&properties->allocFlags, &zeros.allocFlags, sizeof zeros.allocFlags);
}

bool is_reserved(CUdeviceptr address, size_t size) {
  auto range = ranges.upper_bound(address);
  if (range == ranges.begin()) return false;
  --range;
  return address + size <= range->first + range->second;
}
}  // namespace

#define REQUIRE(condition) \
  if (!(condition)) return CUDA_ERROR_INVALID_VALUE

extern "C" {
size_t stub_used_bytes() { return used(); }
size_t stub_pinned_bytes() {
  size_t sum = 0;
  for (const auto& [address, size] : pinned) sum += size;
  return sum;
}
size_t stub_reserved_ranges() { return ranges.size(); }
void stub_set_capacity(size_t bytes) { capacity = bytes; }
size_t stub_properties_bytes() { return sizeof(CUmemAllocationProp); }
size_t stub_access_bytes() { return sizeof(CUmemAccessDesc); }

CUresult cuMemGetAllocationGranularity(size_t* found, const CUmemAllocationProp* properties,
                                       CUmemAllocationGranularity_flags option) {
  REQUIRE(is_right(properties) && option == CU_MEM_ALLOC_GRANULARITY_MINIMUM);
  *found = kGranularity;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* found, size_t size, size_t alignment, CUdeviceptr address,
                             unsigned long long flags) {
  REQUIRE(size && size % kGranularity == 0 && !alignment && !address && !flags);
  void* start = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  REQUIRE(start != MAP_FAILED);
  *found = reinterpret_cast<CUdeviceptr>(start);
  ranges[*found] = size;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
  REQUIRE(ranges.count(address) && ranges[address] == size);
  auto next = mappings.lower_bound(address);
  REQUIRE(next == mappings.end() || next->first >= address + size);
  ranges.erase(address);
  munmap(reinterpret_cast<void*>(address), size);
  return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size,
                     const CUmemAllocationProp* properties, unsigned long long flags) {
  REQUIRE(size && size % kGranularity == 0 && is_right(properties) && !flags);
  if (used() + size > capacity) return CUDA_ERROR_OUT_OF_MEMORY;
  *handle = ++newest;
  memories[newest] = {size, true, false};
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  REQUIRE(memories.count(handle) && memories[handle].is_held);
  memories[handle].is_held = false;
  drop_unreferenced(handle);
  return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
  REQUIRE(memories.count(handle) && memories[handle].size == size && !offset && !flags);
  REQUIRE(is_reserved(address, size) && !mappings.count(address));
  mappings[address] = {size, handle};
  memories[handle].is_mapped = true;
  return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc* access,
                        size_t count) {
  REQUIRE(mappings.count(address) && mappings[address].size == size && count == 1);
  REQUIRE(is_right(access->location) && access->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
  void* start = reinterpret_cast<void*>(address);
  REQUIRE(!mprotect(start, size, PROT_READ | PROT_WRITE));
  memset(start, 0xFF, size);
  return CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void** found, size_t size, unsigned int flags) {
  REQUIRE(size && flags == (CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP));
  if (stub_pinned_bytes() + size > capacity) return CUDA_ERROR_OUT_OF_MEMORY;
  *found = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(*found != MAP_FAILED);
  memset(*found, 0xFF, size);
  pinned[*found] = size;
  return CUDA_SUCCESS;
}

CUresult cuMemFreeHost(void* address) {
  REQUIRE(pinned.count(address));
  munmap(address, pinned[address]);
  pinned.erase(address);
  return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
  REQUIRE(mappings.count(address) && mappings[address].size == size);
  void* start = reinterpret_cast<void*>(address);
  REQUIRE(!madvise(start, size, MADV_DONTNEED) && !mprotect(start, size, PROT_NONE));
  const CUmemGenericAllocationHandle handle = mappings[address].handle;
  mappings.erase(address);
  memories[handle].is_mapped = false;
  drop_unreferenced(handle);
  return CUDA_SUCCESS;
}
}
