// Runs kernels on buffers read from standard input and writes back what they made of them.
//
// Request, repeated until the end of the input: the kernel, the order of threads, and the numbers
// of integers, floats and buffers, then these; see Buffer::read. Response: reads and writes of 16
// bytes, the length of an error and the error, then the buffers that are outputs. Every buffer lies
// between guards that must not be touched, outputs are NaN before the call, and inputs must not
// change.
#include <sanitizer/asan_interface.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "fibers.h"

namespace {

using namespace mnp;
using namespace mnp::cuda;

constexpr size_t kGuard = 4096;
constexpr unsigned char kGuardByte = 0xc5;
int64_t call_number = 0;

[[noreturn]] void die(const std::string& why) {
  std::fprintf(stderr, "call %lld: %s\n", static_cast<long long>(call_number), why.c_str());
  _exit(71);
}

bool read_bytes(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

template <class T>
std::vector<T> read_many(int64_t count) {
  std::vector<T> values(count);
  if (!read_bytes(values.data(), count * sizeof(T))) die("the request is cut off");
  return values;
}

class Buffer {
 public:
  enum Role { input, output, both, missing };

  Buffer(size_t bytes, size_t offset) : bytes_(bytes), front_(kGuard + offset) {
    all_.resize(front_ + bytes + kGuard, kGuardByte);
    std::memset(data(), 0xff, bytes);
  }
  // Role, size in bytes, and how far from a border of 16 bytes; then the bytes of an input.
  static Buffer read() {
    const auto head = read_many<int64_t>(3);
    Buffer buffer(head[1], head[2]);
    buffer.role_ = static_cast<Role>(head[0]);
    if (buffer.role_ == input || buffer.role_ == both) buffer.given_ = read_many<char>(head[1]);
    std::memcpy(buffer.data(), buffer.given_.data(), buffer.given_.size());
    return buffer;
  }
  void* get() { return role_ == missing ? nullptr : data(); }
  Role role() const { return role_; }
  size_t size() const { return bytes_; }
  void guard() {
    ASAN_POISON_MEMORY_REGION(all_.data(), front_);
    ASAN_POISON_MEMORY_REGION(data() + bytes_, kGuard);
  }
  void check() {
    ASAN_UNPOISON_MEMORY_REGION(all_.data(), all_.size());
    for (size_t i = 0; i < all_.size(); ++i)
      if ((i < front_ || i >= front_ + bytes_) && all_[i] != kGuardByte)
        die("a write outside of a buffer");
    if (role_ == input && std::memcmp(data(), given_.data(), bytes_)) die("an input was changed");
  }

 private:
  unsigned char* data() { return all_.data() + front_; }

  size_t bytes_, front_;
  Role role_ = output;
  std::vector<unsigned char> all_;
  std::vector<char> given_;
};

using Ints = std::vector<int64_t>;
using Buffers = std::vector<Buffer>;

// Of ints: batch, neurons, inner, channels last, element, per sample, computed, ReLU.
NeuronLayout layout_of(const Ints& i) { return {i[0], i[1], i[2], i[3] != 0}; }

Error run_epilogue(const Ints& i, Buffers& b) {
  const auto vector = [&](int at) { return PerNeuron{b[at].get(), i[6] != 0}; };
  Epilogue e{layout_of(i), static_cast<Element>(i[4]),
             b[0].get(),   vector(1),
             i[5] != 0,    vector(2),
             vector(3),    vector(4),
             b[5].get(),   i[7] != 0,
             b[6].get()};
  return epilogue(e, nullptr);
}

Error run_epilogue_grad(const Ints& i, Buffers& b) {
  const auto vector = [&](int at) { return PerNeuron{b[at].get(), i[6] != 0}; };
  EpilogueGrad e{layout_of(i), static_cast<Element>(i[4]),
                 b[0].get(),   b[1].get(),
                 b[2].get(),   vector(3),
                 i[5] != 0,    vector(4),
                 vector(5),    b[6].get(),
                 b[7].get(),   b[8].get(),
                 nullptr};
  Buffer workspace(epilogue_grad_workspace(e), 0);
  e.workspace = workspace.get();
  workspace.guard();
  const Error error = epilogue_grad(e, nullptr);
  workspace.check();
  return error;
}

Error run_magnitude(const Ints& i, Buffers& b) {  // element, norm; neurons, size, stride of each
  std::vector<NeuronRows> layers;
  for (size_t l = 0; l < b.size() / 2; ++l)
    layers.push_back(
        {b[2 * l].get(), i[2 + 3 * l], i[3 + 3 * l], i[4 + 3 * l], b[2 * l + 1].get()});
  return magnitude(layers.data(), layers.size(), static_cast<Element>(i[0]),
                   static_cast<Norm>(i[1]), nullptr);
}

Error run_mask_update(const Ints& i, const std::vector<double>& d, Buffers& b) {  // element; sizes
  std::vector<MaskStep> layers;
  for (size_t l = 0; l < b.size() / 4; ++l)
    layers.push_back(
        {b[4 * l].get(), b[4 * l + 1].get(), b[4 * l + 2].get(), b[4 * l + 3].get(), i[1 + l]});
  return mask_update(layers.data(), layers.size(), static_cast<Element>(i[0]), d[0], d[1], d[2],
                     nullptr);
}

}  // namespace

int main() {
  int64_t head[5];  // kernel, reversed, integers, floats, buffers
  for (; read_bytes(head, sizeof head); ++call_number) {
    shim::reversed = head[1];
    const auto ints = read_many<int64_t>(head[2]);
    const auto doubles = read_many<double>(head[3]);
    Buffers buffers;
    for (int64_t i = 0; i < head[4]; ++i) buffers.push_back(Buffer::read());
    for (Buffer& buffer : buffers) buffer.guard();
    shim::wide_reads = shim::wide_writes = 0;
    const Error error = head[0] == 0   ? run_epilogue(ints, buffers)
                        : head[0] == 1 ? run_epilogue_grad(ints, buffers)
                        : head[0] == 2 ? run_magnitude(ints, buffers)
                                       : run_mask_update(ints, doubles, buffers);
    for (Buffer& buffer : buffers) buffer.check();
    const std::string text = error ? error : "";
    const int64_t numbers[] = {shim::wide_reads, shim::wide_writes,
                               static_cast<int64_t>(text.size())};
    std::fwrite(numbers, sizeof numbers, 1, stdout);
    std::fwrite(text.data(), 1, text.size(), stdout);
    for (Buffer& buffer : buffers)
      if (buffer.role() == Buffer::output || buffer.role() == Buffer::both)
        std::fwrite(buffer.get(), 1, buffer.size(), stdout);
  }
}
