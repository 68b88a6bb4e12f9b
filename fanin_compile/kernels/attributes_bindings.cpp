// Whether modules and their dicts hold the very objects they held, for hundreds of them in one call: see attributes.py,
// which writes the table. Called through ctypes, with the interpreter's lock held. After a network has run, all of this is
// far from the core; the loads of one module do not wait here for those of the one before.
#if __has_include(<Python.h>)
#include <Python.h>

#include <cstdint>

namespace {

PyObject* at(int64_t address) { return reinterpret_cast<PyObject*>(static_cast<intptr_t>(address)); }

// Of a module that is alive, the type and the dict that it had.
bool same_module(PyObject* module, int64_t type, int64_t dict) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != at(type)) return false;
  PyObject* found = PyObject_GenericGetDict(module, nullptr);
  Py_XDECREF(found);            // the module holds it
  return found == at(dict);
}

// Whether the first keys of the dict, all it has, are those of the entries.
bool same_keys(PyObject* dict, int64_t count, const int64_t* entries) {
  if (PyDict_GET_SIZE(dict) != count) return false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (; PyDict_Next(dict, &position, &key, &value); entries += 2)
    if (key != at(entries[0])) return false;
  return true;
}

bool look_up(PyObject* dict, int64_t key, PyObject** value) {
  *value = PyDict_GetItemWithError(dict, at(key));
  if (*value || !PyErr_Occurred()) return true;
  PyErr_Clear();                // another key's __eq__ raised
  return false;
}

// Counts the changes of a dict, of all dicts together, where Python tells; 0 where it does not.
int64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030c0000
  return static_cast<int64_t>(reinterpret_cast<PyDictObject*>(dict)->ma_version_tag);
#else
  return (void)dict, 0;
#endif
}

// What the table says of one dict.
struct Dict {
  int64_t module, type, dict;   // 0, 0 for one that is no module's
  int64_t version;              // at which its entries were found to be as they were, or 0
  int64_t ordered;              // keys that are all of it, in order; or -1
  int64_t entries, absent;

  const int64_t* found() const { return reinterpret_cast<const int64_t*>(this + 1); }          // [entries] key, value or 0: any
  const int64_t* missing() const { return found() + 2 * entries; }                            // [absent] keys
  Dict* next() { return reinterpret_cast<Dict*>(const_cast<int64_t*>(missing() + absent)); }
};

bool same_entries(const Dict& d) {
  if (d.ordered >= 0 && !same_keys(at(d.dict), d.ordered, d.found())) return false;
  PyObject* value;
  for (const int64_t* entry = d.found(); entry < d.missing(); entry += 2)
    if (entry[1] && !(look_up(at(d.dict), entry[0], &value) && value == at(entry[1]))) return false;
  for (int64_t i = 0; i < d.absent; ++i)
    if (!look_up(at(d.dict), d.missing()[i], &value) || value) return false;
  return true;
}

}  // namespace

// `table`: a Dict for each module or dict of one, a parent before what it holds; `root` is the first. Each of the others is
// alive because it was found, before it is read here, where it had been. Versions are written.
extern "C" __attribute__((visibility("default"))) int fanin_attributes(PyObject* root, int64_t* table, int64_t count) {
  auto* d = reinterpret_cast<Dict*>(table);
  auto* const end = reinterpret_cast<Dict*>(table + count);
  if (d == end || at(d->module) != root) return 0;
  for (; d < end; d = d->next()) {
    if (d->module && !same_module(at(d->module), d->type, d->dict)) return 0;
    if (!PyDict_CheckExact(at(d->dict))) return 0;
    const int64_t version = version_of(at(d->dict));
    if (version && version == d->version) continue;
    if (!same_entries(*d)) return 0;
    d->version = version;
  }
  return 1;
}
#endif
