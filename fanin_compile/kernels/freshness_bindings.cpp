// What can be told of tensors without reading their elements, for hundreds of them in one call: see freshness.py, which
// has the same in Python. Called through ctypes, with the interpreter's lock held: operators would take a list of tensors
// apart first. After a network has run, all of this is far from the core; the loads of one tensor do not wait here for
// those of the one before.
#if __has_include(<Python.h>)
#include <Python.h>
#include <ATen/core/Tensor.h>

#include <cstring>

namespace {

// How torch lays out its Python objects (torch/csrc/autograd/python_variable.h, which takes nine seconds to compile);
// fanin_state() compares with Tensor._cdata.
struct TensorObject {
  PyObject_HEAD
  at::Tensor tensor;
};

// Calls word(w) for each word of a tensor's state as long as it returns true.
template <class F>
bool visit(PyObject* object, const F& word) {
  const at::Tensor& t = reinterpret_cast<TensorObject*>(object)->tensor;
  const at::TensorImpl* impl = t.unsafeGetTensorImpl();
  const auto at = [&](const void* address) { return word(static_cast<int64_t>(reinterpret_cast<intptr_t>(address))); };
  bool same = at(Py_TYPE(object)) && at(impl) && at(t.storage().unsafeGetStorageImpl()) && at(t.const_data_ptr()) &&
              word(impl->version_counter().current_version()) && word(static_cast<int64_t>(impl->key_set().raw_repr())) &&
              word(static_cast<int64_t>(t.scalar_type())) && word(t.dim());
  for (const int64_t size : t.sizes()) same = same && word(size);
  for (const int64_t stride : t.strides()) same = same && word(stride);
  return same;
}

}  // namespace

#define FANIN_EXPORT extern "C" __attribute__((visibility("default")))

// The number of words of the tensor's state, the first `capacity` of which are written. 0: it does not hold its address, `cdata`,
// where it is expected, and nothing else is read.
FANIN_EXPORT int64_t fanin_state(PyObject* tensor, int64_t cdata, int64_t* words, int64_t capacity) {
  static_assert(sizeof(at::Tensor) == sizeof(int64_t));
  int64_t found;
  std::memcpy(&found, &reinterpret_cast<TensorObject*>(tensor)->tensor, sizeof(found));
  if (found != cdata) return 0;
  int64_t count = 0;
  visit(tensor, [&](int64_t w) {
    if (count < capacity) words[count] = w;
    return ++count > 0;
  });
  return count;
}

// Whether tensors are as they were. `words` has for each its place in the tuple `args` (-1: elsewhere), the address of its
// object, which its caller keeps alive, and its state.
FANIN_EXPORT int fanin_unchanged(PyObject* args, const int64_t* words, int64_t count) {
  const int64_t* const end = words + count;
  while (words < end) {
    const int64_t place = *words++;
    auto* const object = reinterpret_cast<PyObject*>(static_cast<intptr_t>(*words++));
    if (place >= PyTuple_GET_SIZE(args) || (place >= 0 && PyTuple_GET_ITEM(args, place) != object)) return 0;
    // as many words as before: the number of dimensions comes before sizes and strides
    if (!visit(object, [&](int64_t w) { return w == *words++; })) return 0;
  }
  return 1;
}
#endif
