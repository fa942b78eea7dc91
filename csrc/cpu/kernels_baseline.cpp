// Any 64-bit CPU: 16-byte vectors (SSE2 on x86-64, NEON on aarch64).
#define MNP_ISA baseline
#define MNP_VEC_BYTES 16
#define MNP_ROWS 4
#include "isa.inl"
