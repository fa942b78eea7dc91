// x86-64 with AVX2 and FMA: 12 accumulators of the 16 vector registers.
#define MNP_ISA avx2
#define MNP_VEC_BYTES 32
#define MNP_ROWS 6
#include "isa.inl"
