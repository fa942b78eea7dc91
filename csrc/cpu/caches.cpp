#include "caches.h"

#ifdef __APPLE__
#include <sys/sysctl.h>
#else
#include <unistd.h>
#endif

namespace mnp::cpu {
namespace {

// What the system says where that is believable, else `otherwise`.
#ifdef __APPLE__
int64_t cache_size(const char* name, int64_t otherwise) {
  int64_t size = 0;
  size_t length = sizeof(size);
  const bool known = sysctlbyname(name, &size, &length, nullptr, 0) == 0;
  return known && size >= 8 * 1024 ? size : otherwise;
}
#else
int64_t cache_size(int name, int64_t otherwise) {
  const int64_t size = sysconf(name);
  return size >= 8 * 1024 ? size : otherwise;
}
#endif

Caches read() {
#ifdef __APPLE__
  return {cache_size("hw.l1dcachesize", 32 * 1024), cache_size("hw.l2cachesize", 512 * 1024)};
#elif defined(_SC_LEVEL1_DCACHE_SIZE)
  return {cache_size(_SC_LEVEL1_DCACHE_SIZE, 32 * 1024),
          cache_size(_SC_LEVEL2_CACHE_SIZE, 512 * 1024)};
#else
  return {32 * 1024, 512 * 1024};
#endif
}

}  // namespace

const Caches& caches() {
  static const Caches found = read();
  return found;
}

}  // namespace mnp::cpu
