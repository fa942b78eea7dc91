#include "fibers.h"

#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else  // nobody watches the stacks
template <class... Arguments>
void __sanitizer_start_switch_fiber(Arguments...) {}
template <class... Arguments>
void __sanitizer_finish_switch_fiber(Arguments...) {}
#endif

namespace shim {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr int kWarp = 32;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* fake_stack = nullptr;
  bool done;
  long exchanges;  // so far; the slot of each is read before the one after the next is given
  Slot slot[2];
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
const void* scheduler_stack;
size_t scheduler_size;
void* scheduler_fake;
const std::function<void()>* work;
int running, threads, living, arrived;
long generation;
bool progress;  // whether some fiber got on since the scheduler's round began

[[noreturn]] void die(const char* why) {
  std::fprintf(stderr, "shim: %s\n", why);
  _exit(70);
}

void to_scheduler(bool leaving) {
  Fiber& self = fibers[running];
  __sanitizer_start_switch_fiber(leaving ? nullptr : &self.fake_stack, scheduler_stack,
                                 scheduler_size);
  swapcontext(&self.context, &scheduler);
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
}

void release_block() {
  arrived = 0;
  ++generation;
}

void main_of_fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
  (*work)();
  fibers[running].done = true;
  --living;
  progress = true;
  if (living && arrived == living) release_block();
  to_scheduler(true);
}

void resume(int thread) {
  running = thread;
  Fiber& fiber = fibers[thread];
  __sanitizer_start_switch_fiber(&scheduler_fake, fiber.stack.get(), kStack);
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
}

}  // namespace

int thread() { return running; }

void run_block(int count, const std::function<void()>& body) {
  if (static_cast<int>(fibers.size()) < count) fibers.resize(count);
  work = &body;
  threads = living = count;
  arrived = 0;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    fiber.exchanges = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, main_of_fiber, 0);
  }
  while (living) {
    progress = false;
    for (int i = 0; i < count; ++i) {
      const int next = reversed ? count - 1 - i : i;
      if (!fibers[next].done) resume(next);
    }
    if (!progress) die("threads wait for each other for ever");
  }
}

void wait_for_block() {
  const long mine = generation;
  progress = true;
  if (++arrived == living) return release_block();
  while (generation == mine) to_scheduler(false);
  progress = true;
}

Slot exchange(unsigned lanes, Slot given, int mask) {
  const int lane = running % kWarp, first = running - lane;
  Fiber& self = fibers[running];
  const long turn = ++self.exchanges;
  self.slot[turn % 2] = given;
  progress = true;
  for (int other = 0; other < kWarp; ++other) {
    if (!(lanes >> other & 1)) continue;
    if (first + other >= threads) die("a shuffle names lanes that do not exist");
    const Fiber& fiber = fibers[first + other];
    while (fiber.exchanges < turn) {
      if (fiber.done) die("a shuffle names a lane that has left");
      to_scheduler(false);
    }
  }
  progress = true;
  return fibers[first + (lane ^ mask)].slot[turn % 2];
}

}  // namespace shim
