// Any convolution: which kernel computes it. Included once per instruction set; see isa.inl.
#pragma once

template <class T>
int64_t panels_size(const PackPanels<T>& a) {
  constexpr int64_t L = VecOf<T>::lanes;
  const bool narrow = is_narrow<T>(a.groups, a.depth, a.width);
  const int64_t outputs =
      narrow ? (a.groups * a.width + L - 1) / L * L : a.groups * Panels<T>{a.width}.padded();
  return outputs * a.taps * a.depth;
}

template <class T>
int64_t panels_count(const PackPanels<T>& a) {
  constexpr int64_t L = VecOf<T>::lanes;
  const bool narrow = is_narrow<T>(a.groups, a.depth, a.width);
  return narrow ? (a.groups * a.width + L - 1) / L : a.groups * Panels<T>{a.width}.count();
}

template <class T>
void pack_panels(const PackPanels<T>& a, int64_t begin, int64_t end, T* panels) {
  const bool narrow = is_narrow<T>(a.groups, a.depth, a.width);
  narrow ? pack_narrow(a, begin, end, panels) : pack_dense(a, begin, end, panels);
}

template <class T>
int64_t direct_scratch(const Direct<T>& a) {
  if (is_grouped(a)) return grouped_scratch(a);
  return is_narrow<T>(a.groups, a.depth, a.width) ? narrow_scratch(a) : dense_scratch(a);
}

template <class T>
void direct(const Direct<T>& a, int64_t begin, int64_t end, char* scratch) {
  if (is_grouped(a)) return grouped(a, begin, end, scratch);
  const bool is = is_narrow<T>(a.groups, a.depth, a.width);
  is ? narrow(a, begin, end, scratch) : dense(a, begin, end, scratch);
}
