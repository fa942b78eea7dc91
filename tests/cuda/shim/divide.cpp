// Compares divide() with the compiler's own division, next to multiples of the divisor.
#include <cstdio>
#include <random>

#include "cuda/device.cuh"

int main() {
  std::mt19937_64 random(0);
  for (int i = 0; i < 1000000; ++i) {
    const int64_t b = 1 + static_cast<int64_t>(random() >> (12 + random() % 52));
    const int64_t near = static_cast<int64_t>(random() >> (12 + random() % 52)) / b * b;
    for (int64_t a = near - 1; a <= near + 1; ++a)
      if (a >= 0 && mnp::cuda::divide(a, mnp::cuda::Divisor(b)) != a / b) {
        std::printf("%lld / %lld is not %lld\n", static_cast<long long>(a),
                    static_cast<long long>(b), static_cast<long long>(a / b));
        return 1;
      }
  }
}
