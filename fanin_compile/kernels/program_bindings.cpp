// Runs a program, operators in a fixed order, without Python between them. Its text is described in ../program.py, the
// operators that run it are defined in ../ops_program.py. What an operator needs of the stack is made ready once for a text.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <charconv>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace {

using c10::IValue;
using torch::jit::Stack;

struct Argument {
  enum class Kind { constant, tensor, taken, size, sizes } kind = Kind::constant;       // taken: a tensor read for the last time
  IValue constant;
  int64_t index = 0;            // of the register or size
  std::vector<std::pair<bool, int64_t>> items;          // of sizes: whether it is the index of a size, and that or the number
};

constexpr int64_t kUnread = -1;

struct Instruction {
  c10::OperatorHandle op;
  std::vector<Argument> arguments;
  std::vector<int64_t> results; // registers, or kUnread
  bool lists;                   // its one result is a list of tensors
};

struct Program {
  int64_t inputs, sizes, registers;
  std::vector<Instruction> instructions;
  std::vector<int64_t> outputs;
};

// ---- reading a text ------------------------------------------------------------------------------------------------------

// One value of a line: None, True, False, a number, a string without escapes, a list of values.
struct Value {
  enum class Kind { null, boolean, integer, real, string, list } kind = Kind::null;
  int64_t integer = 0;
  double real = 0;
  std::string_view string;
  std::vector<Value> list;

  bool refers(char to) const { return kind == Kind::string && !string.empty() && string[0] == to; }
  int64_t index() const;        // of the register or size that it refers to
};

template <class T>
T number_in(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  TORCH_CHECK_VALUE(error == std::errc{} && end == text.data() + text.size(), "fanin: '", text, "' in a program is no number");
  return value;
}

int64_t Value::index() const { return number_in<int64_t>(string.substr(1)); }

class Reader {
 public:
  explicit Reader(std::string_view line) : line_(line) {}

  Value value() {
    skip();
    const char c = peek();
    Value v;
    if (c == '[') {
      v.kind = Value::Kind::list, ++at_;
      for (skip(); peek() != ']'; skip()) {
        v.list.push_back(value()), skip();
        if (peek() == ',') ++at_;
      }
      ++at_;
    } else if (c == '\'') {
      const size_t end = line_.find('\'', at_ + 1);
      TORCH_CHECK_VALUE(end != line_.npos, "fanin: a string has no end in line '", line_, "' of a program");
      v.kind = Value::Kind::string, v.string = line_.substr(at_ + 1, end - at_ - 1), at_ = end + 1;
    } else {
      const std::string_view word = line_.substr(at_, std::min(line_.find_first_of(",] ", at_), line_.size()) - at_);
      at_ += word.size();
      if (word == "True" || word == "False") v.kind = Value::Kind::boolean, v.integer = word == "True";
      else if (word == "None") v.kind = Value::Kind::null;
      else if (word.find_first_of(".e") != word.npos) v.kind = Value::Kind::real, v.real = number_in<double>(word);
      else v.kind = Value::Kind::integer, v.integer = number_in<int64_t>(word);
    }
    return v;
  }

 private:
  char peek() const {
    TORCH_CHECK_VALUE(at_ < line_.size(), "fanin: line '", line_, "' of a program ends early");
    return line_[at_];
  }
  void skip() {
    while (at_ < line_.size() && line_[at_] == ' ') ++at_;
  }

  std::string_view line_;
  size_t at_ = 0;
};

const std::vector<Value>& list_of(const Value& value, size_t count) {
  TORCH_CHECK_VALUE(value.kind == Value::Kind::list && (count == 0 || value.list.size() == count), "fanin: a program has ",
                    value.list.size(), " items where ", count, " are expected");
  return value.list;
}

c10::OperatorHandle operator_named(std::string_view name) {
  const size_t colons = name.find("::"), dot = name.find('.', colons == name.npos ? 0 : colons);
  const std::string base(name.substr(0, dot)), overload(dot == name.npos ? "" : name.substr(dot + 1));
  const auto found = c10::Dispatcher::singleton().findSchema({base, overload});
  TORCH_CHECK_VALUE(found, "fanin: a program calls '", name, "', expected an operator of torch or of ours");
  return *found;
}

// A constant as an argument of this type.
IValue constant_of(const Value& value, const c10::Type& type) {
  switch (value.kind) {
    case Value::Kind::null: return {};
    case Value::Kind::boolean: return value.integer != 0;
    case Value::Kind::real: return value.real;
    case Value::Kind::string: return std::string(value.string);
    case Value::Kind::integer: break;
    case Value::Kind::list: TORCH_CHECK_VALUE(false, "fanin: a list of a program holds what is no number");
  }
  if (const auto* optional = type.castRaw<c10::OptionalType>()) return constant_of(value, *optional->getElementType());
  return type.kind() == c10::TypeKind::FloatType ? IValue(static_cast<double>(value.integer)) : IValue(value.integer);
}

Argument argument_of(const Value& value, const c10::Type& type) {
  Argument a;
  if (value.refers('%') || value.refers('$')) {
    a.kind = value.string[0] == '%' ? Argument::Kind::tensor : Argument::Kind::size, a.index = value.index();
  } else if (value.kind == Value::Kind::list) {
    bool constant = true;
    for (const Value& item : value.list) {
      const bool refers = item.refers('$');
      TORCH_CHECK_VALUE(refers || item.kind == Value::Kind::integer, "fanin: a list of a program holds what is no number");
      a.items.emplace_back(refers, refers ? item.index() : item.integer), constant = constant && !refers;
    }
    a.kind = Argument::Kind::sizes;
    if (constant) {
      c10::List<int64_t> list;
      for (const auto& [refers, number] : a.items) list.push_back(number);
      a.kind = Argument::Kind::constant, a.constant = std::move(list), a.items.clear();
    }
  } else {
    a.constant = constant_of(value, type);
  }
  return a;
}

// Each index is in range, each register is written before it is read and once, the last reading of a register takes it.
void check_registers(Program& p) {
  std::vector<Argument*> last(p.registers, nullptr);
  std::vector<bool> written(p.registers, false);
  std::fill_n(written.begin(), p.inputs, true);
  const auto readable = [&](int64_t i) {
    TORCH_CHECK_VALUE(i >= 0 && i < p.registers && written[i], "fanin: a program reads register ", i, " before it is written");
  };
  const auto given = [&](int64_t i) {
    TORCH_CHECK_VALUE(i >= 0 && i < p.sizes, "fanin: a program reads size ", i, " of ", p.sizes);
  };
  for (Instruction& step : p.instructions) {
    for (Argument& a : step.arguments) {
      if (a.kind == Argument::Kind::tensor) readable(a.index), last[a.index] = &a;
      if (a.kind == Argument::Kind::size) given(a.index);
      for (const auto& [refers, index] : a.items)
        if (refers) given(index);
    }
    for (const int64_t i : step.results)
      if (i != kUnread) {
        TORCH_CHECK_VALUE(!written[i], "fanin: a program writes register ", i, " twice");
        written[i] = true;
      }
  }
  for (const int64_t i : p.outputs) readable(i), last[i] = nullptr;
  for (int64_t i = p.inputs; i < p.registers; ++i)              // inputs are the caller's
    if (last[i]) last[i]->kind = Argument::Kind::taken;
}

std::shared_ptr<const Program> parse(std::string_view text) {
  auto p = std::make_shared<Program>();
  bool ended = false;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(';', at), text.size());
    const Value whole = Reader(text.substr(at, end - at)).value();
    const std::vector<Value>& line = list_of(whole, 0);
    TORCH_CHECK_VALUE(!ended && !line.empty() && line[0].kind == Value::Kind::string, "fanin: a line of a program names no operator");
    const std::string_view name = line[0].string;
    if (at == 0) {
      list_of(whole, 3);
      p->inputs = p->registers = line[1].integer, p->sizes = line[2].integer;
    } else if (name == "return") {
      for (const Value& v : list_of(list_of(whole, 2)[1], 0)) p->outputs.push_back(v.integer);
      ended = true;
    } else {
      list_of(whole, 3);
      Instruction step{operator_named(name), {}, {}, false};
      const c10::FunctionSchema& schema = step.op.schema();
      const std::vector<Value>& values = list_of(line[2], 0);
      TORCH_CHECK_VALUE(values.size() == schema.arguments().size(), "fanin: a program calls ", name, " with ", values.size(),
                        " arguments, expected ", schema.arguments().size());
      for (size_t i = 0; i < values.size(); ++i) step.arguments.push_back(argument_of(values[i], *schema.arguments()[i].type()));
      for (const Value& v : list_of(line[1], 0)) {
        step.results.push_back(v.kind == Value::Kind::null ? kUnread : v.integer);
        TORCH_CHECK_VALUE(step.results.back() >= kUnread, "fanin: a program has a register ", v.integer);
        p->registers = std::max(p->registers, step.results.back() + 1);
      }
      const auto& returns = schema.returns();
      step.lists = returns.size() == 1 && returns[0].type()->kind() == c10::TypeKind::ListType;
      TORCH_CHECK_VALUE(step.lists || step.results.size() == returns.size(), "fanin: a program takes ", step.results.size(),
                        " results of ", name, ", expected ", returns.size());
      p->instructions.push_back(std::move(step));
    }
    at = end + 1;
  }
  TORCH_CHECK_VALUE(ended, "fanin: a program has no line 'return'");
  check_registers(*p);
  return p;
}

// Programs by their text.
class Programs {
 public:
  std::shared_ptr<const Program> find(const std::string& text) {
    const std::lock_guard lock(mutex_);
    if (const auto found = programs_.find(text); found != programs_.end()) return found->second;
    if (programs_.size() >= kMost) programs_.clear();           // a process that compiles for ever
    return programs_[text] = parse(text);
  }

 private:
  static constexpr size_t kMost = 1024;
  std::mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<const Program>> programs_;
};

Programs& programs() {
  static Programs all;
  return all;
}

// ---- running -------------------------------------------------------------------------------------------------------------

void push(Stack& stack, const Argument& a, std::vector<IValue>& registers, const std::vector<IValue>& sizes) {
  switch (a.kind) {
    case Argument::Kind::constant: stack.push_back(a.constant); break;
    case Argument::Kind::tensor: stack.push_back(registers[a.index]); break;
    case Argument::Kind::taken: stack.push_back(std::move(registers[a.index])); break;
    case Argument::Kind::size: stack.push_back(sizes[a.index]); break;
    case Argument::Kind::sizes: {
      c10::List<int64_t> list;
      list.reserve(a.items.size());
      for (const auto& [refers, number] : a.items) list.push_back(refers ? sizes[number].toInt() : number);
      stack.push_back(std::move(list));
    }
  }
}

void keep(const Instruction& step, Stack& stack, std::vector<IValue>& registers) {
  const std::vector<int64_t>& to = step.results;
  if (step.lists) {
    const std::vector<at::Tensor> given = stack.back().toTensorVector();
    TORCH_CHECK_VALUE(to.size() <= given.size(), "fanin: a program takes ", to.size(), " of ", given.size(), " pieces");
    for (size_t i = 0; i < to.size(); ++i)
      if (to[i] != kUnread) registers[to[i]] = given[i];
  } else {
    for (size_t i = 0; i < to.size(); ++i)
      if (to[i] != kUnread) registers[to[i]] = std::move(stack[stack.size() - to.size() + i]);
  }
  stack.clear();
}

// (inputs, written?, sizes, text) -> outputs, as a list or one by one as the operator's schema has them.
void run(const c10::OperatorHandle& op, Stack* caller) {
  const size_t count = op.schema().arguments().size();
  Stack given(std::make_move_iterator(caller->end() - static_cast<int64_t>(count)), std::make_move_iterator(caller->end()));
  torch::jit::drop(*caller, count);
  const std::shared_ptr<const Program> program = programs().find(given[count - 1].toStringRef());
  std::vector<IValue> registers, sizes;
  registers.reserve(program->registers);
  for (size_t i = 0; i + 2 < count; ++i)
    for (const at::Tensor& t : given[i].toTensorVector()) registers.emplace_back(t);
  for (const int64_t size : given[count - 2].toDimVector()) sizes.emplace_back(size);
  TORCH_CHECK_VALUE(static_cast<int64_t>(registers.size()) == program->inputs && static_cast<int64_t>(sizes.size()) == program->sizes,
                    "fanin: a program is given ", registers.size(), " tensors and ", sizes.size(), " sizes, expected ",
                    program->inputs, " and ", program->sizes);
  registers.resize(program->registers);
  Stack stack;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    for (const Instruction& step : program->instructions) {
      for (const Argument& a : step.arguments) push(stack, a, registers, sizes);
      step.op.callBoxed(&stack);
      keep(step, stack, registers);
    }
  }
  const auto& returns = op.schema().returns();
  if (returns.size() == 1 && returns[0].type()->kind() == c10::TypeKind::ListType) {
    c10::List<at::Tensor> outputs;
    for (const int64_t i : program->outputs) outputs.push_back(registers[i].toTensor());
    caller->emplace_back(std::move(outputs));
  } else {
    TORCH_CHECK_VALUE(returns.size() == program->outputs.size(), "fanin: a program has ", program->outputs.size(),
                      " outputs, expected ", returns.size());
    for (const int64_t i : program->outputs) caller->push_back(registers[i]);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fanin, CPU, m) {
  const auto boxed = [] { return torch::CppFunction::makeFromBoxedFunction<&run>(); };
  m.impl("run_program", boxed());
  m.impl("run_program.of1", boxed());
  for (const char* outputs : {"1", "2", "3", "4", "5", "6", "7", "8"})
    m.impl((std::string("run_program_writing.of") + outputs).c_str(), boxed());
}
