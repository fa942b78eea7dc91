// The threads of a block as fibers: each runs until it waits for others, then the next one does.
//
// Running them in order and in reverse shows a missing barrier either way: a thread that reads what
// others have not written yet, or writes over what they have not read.
#pragma once

#include <functional>

namespace shim {

struct Slot {
  unsigned char bytes[16];
};

inline bool reversed = false;                      // the order of blocks and threads
inline long long wide_reads = 0, wide_writes = 0;  // accesses of 16 bytes

int thread();  // the running one
void run_block(int threads, const std::function<void()>& body);
void wait_for_block();
// What lane (own ^ mask) of the warp gave.
Slot exchange(unsigned lanes, Slot given, int mask);

}  // namespace shim
