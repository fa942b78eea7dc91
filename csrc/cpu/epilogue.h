// What turns a product into an output. Included once per instruction set; see isa.inl.
#pragma once

// The result of a comparison as one byte a lane, 0 or 255, and back. In shuffles of bytes:
// compilers make conversions of vectors element by element.
template <class T>
using Compared = decltype(Vec<T>{} < Vec<T>{});

template <class T>
inline void store_flags(uint8_t* to, Compared<T> lanes, int64_t count) {
  Vec<uint8_t> first{};
  for (int j = 0; j < VecOf<T>::lanes; ++j) first[j] = j * sizeof(T);
  const Vec<uint8_t> bytes = __builtin_shuffle((Vec<uint8_t>)lanes, first);
  if (count >= VecOf<T>::lanes)
    __builtin_memcpy(to, &bytes, VecOf<T>::lanes);
  else
    for (int64_t j = 0; j < count; ++j) to[j] = bytes[j];
}

template <class T>
inline Compared<T> load_flags(const uint8_t* from, int64_t count) {
  constexpr int L = VecOf<T>::lanes, kWords = (L + 7) / 8;
  uint64_t words[kWords] = {};
  if (count >= L)
    __builtin_memcpy(words, from, L);
  else
    __builtin_memcpy(words, from, count);
  Vec<uint64_t> repeated;
  Vec<uint8_t> lane;
  for (int j = 0; j < VecOf<uint64_t>::lanes; ++j) repeated[j] = words[j % kWords];
  for (int j = 0; j < VecOf<uint8_t>::lanes; ++j) lane[j] = j / sizeof(T);
  return (Compared<T>)__builtin_shuffle((Vec<uint8_t>)repeated, lane);
}

// What the equation makes of u where the mask is given: gain * u + offset.
template <class T>
struct Affine {
  Vec<T> gain, offset;
  Affine() = default;
  Affine(Vec<T> mask, Vec<T> scale, Vec<T> shift, Vec<T> bias)
      : gain(mask * scale), offset(mask * shift + bias) {}
};

// One vector of neurons [first, first + count) of a sample, of which `count` exist.
template <class T>
struct OutputLane {
  const Epilogue<T>* e;
  Affine<T> affine;
  int64_t count;
  OutputLane(const Epilogue<T>* epilogue, int64_t sample, int64_t first, int64_t used)
      : e(epilogue), count(used) {
    if (!e->mask) return;
    affine = {load_some<T>(e->mask + sample * e->mask_stride + first, count),
              load_some<T>(e->scale + first, count), load_some<T>(e->shift + first, count),
              load_some<T>(e->bias + first, count)};
  }
  // What a later write at `element` will read, and where it will write.
  void prefetch(const T* output, int64_t element) const {
    if (e->residual) __builtin_prefetch(e->residual + element);
    if (e->u) __builtin_prefetch(e->u + element, 1);
    __builtin_prefetch(output + element, 1);
  }
  // Writes at `element` of the image.
  void write(T* output, int64_t element, Vec<T> u) const {
    if (e->u) store_some<T>(e->u + element, u, count);
    if (e->mask) u = affine.gain * u + affine.offset;
    if (e->residual) u += load_some<T>(e->residual + element, count);
    if (e->active) store_flags<T>(e->active + element, ~(u <= T(0)), count);
    if (e->relu) u = relu(u);
    store_some<T>(output + element, u, count);
  }
};

// Neurons [first, first + count) of one pixel, whose u is given.
template <class T>
inline void write_pixel(const Epilogue<T>* e, const T* u, int64_t sample, int64_t first,
                        int64_t count, T* output, int64_t element) {
  constexpr int64_t L = VecOf<T>::lanes;
  const Epilogue<T> own = *e;  // no store can change it
  int64_t j = 0;
  for (; j + L <= count; j += L)
    OutputLane<T>(&own, sample, first + j, L).write(output, element + j, load<T>(u + j));
  if (const int64_t left = count - j; left > 0)
    OutputLane<T>(&own, sample, first + j, left)
        .write(output, element + j, load_some<T>(u + j, left));
}
