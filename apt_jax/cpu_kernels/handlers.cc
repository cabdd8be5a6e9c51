// The functions that XLA calls.
#include "attention.h"
#include "chunk.h"
#include "layers.h"
#include "products.h"
#include "relay.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using ffi::DataType;

namespace {

// XLA makes a pool of a thread for each core of the host; a process may be allowed fewer.
std::atomic<int> most_threads{std::numeric_limits<int>::max()};

apt::Team team_of(ffi::ThreadPool& pool) {
  const int threads = std::min(int(pool.num_threads()), most_threads.load(std::memory_order_relaxed));
  return apt::Team(threads, [&pool](apt::Team::Task task) { pool.Schedule(std::move(task)); });
}

// Whether `array` is of Number's type.
template <class Number>
bool is_of(const ffi::AnyBuffer& array) {
  return array.element_type() == (std::is_same_v<Number, float> ? DataType::F32 : DataType::BF16);
}

ffi::Error refuse(const std::string& what, const ffi::AnyBuffer& array, const char* taken = "F32 or BF16") {
  std::ostringstream type;
  type << static_cast<XLA_FFI_DataType>(array.element_type());
  return ffi::Error::InvalidArgument("the CPU kernels take " + what + " of " + taken + ", not of " + type.str() +
                                     "; convert the numbers, or leave them to XLA");
}

// `use` with the numbers of `array`; refuses types that the kernels do not compute in. `what` names it.
template <class Use>
ffi::Error with_numbers_of(const ffi::AnyBuffer& array, const char* what, const Use& use) {
  if (is_of<float>(array)) return use(static_cast<const float*>(array.untyped_data()));
  if (is_of<apt::BFloat16>(array)) return use(static_cast<const apt::BFloat16*>(array.untyped_data()));
  return refuse(what, array);
}

using Floats = ffi::Buffer<DataType::F32>;
using Numbers = ffi::Buffer<DataType::S32>;
using Counts = ffi::Buffer<DataType::U32>;
using Codes = ffi::Buffer<DataType::S8>;

// The table of row r of `blocks [rows, pages]`, by r.
auto tables(const Numbers& blocks) {
  return [first = blocks.typed_data(), pages = blocks.dimensions()[1]](int r) { return first + r * pages; };
}

template <class Number>
void decode_kv(ffi::ThreadPool threads, Floats q, const apt::Pages<Number>& pages, int page_tokens, Numbers key_blocks,
               Numbers value_blocks, Numbers length, ffi::Result<Floats> out, ffi::Result<Floats> lse) {
  apt::Team team = team_of(threads);
  const auto sizes = q.dimensions();
  const apt::Shape shape{int(sizes[0]), int(sizes[1]), int(sizes[1] * sizes[2]), page_tokens};
  apt::kv_decode(team, shape, apt::alone(shape.rows), q.typed_data(), pages, tables(key_blocks), tables(value_blocks), length.typed_data(),
                 out->typed_data(), lse->typed_data());
}

template <class X, class Number>
void decode_hidden(ffi::ThreadPool threads, Floats q, const apt::Pages<Number>& pages, int page_tokens, Numbers blocks,
                   Numbers length, ffi::Result<Floats> out, ffi::Result<Floats> lse) {
  apt::Team team = team_of(threads);
  const auto sizes = q.dimensions();
  const apt::Shape shape{int(sizes[0]), int(sizes[1]), int(sizes[2]), page_tokens};
  apt::hidden_decode<X>(team, shape, apt::alone(shape.rows), q.typed_data(), pages, tables(blocks), length.typed_data(), out->typed_data(),
                        lse->typed_data());
}

ffi::Error kv_decode(ffi::ThreadPool threads, Floats q, ffi::AnyBuffer pool, Numbers key_blocks, Numbers value_blocks,
                     Numbers length, ffi::Result<Floats> out, ffi::Result<Floats> lse) {
  return with_numbers_of(pool, "a pool", [&]<class Number>(const Number* numbers) {
    decode_kv<Number>(threads, q, {numbers}, pool.dimensions()[1], key_blocks, value_blocks, length, out, lse);
    return ffi::Error::Success();
  });
}

ffi::Error hidden_decode(ffi::ThreadPool threads, Floats q, ffi::AnyBuffer pool, Numbers blocks, Numbers length,
                         ffi::Result<Floats> out, ffi::Result<Floats> lse) {
  return with_numbers_of(pool, "a pool", [&]<class Number>(const Number* numbers) {
    decode_hidden<apt::Factor<Number>, Number>(threads, q, {numbers}, pool.dimensions()[1], blocks, length, out, lse);
    return ffi::Error::Success();
  });
}

apt::Pages<int8_t> pages_of(const Codes& pool, const Floats& scales) {
  return {pool.typed_data(), scales.typed_data(), int(scales.dimensions()[2])};
}

ffi::Error kv_decode_int8(ffi::ThreadPool threads, Floats q, Codes pool, Floats scales, Numbers key_blocks,
                          Numbers value_blocks, Numbers length, ffi::Result<Floats> out, ffi::Result<Floats> lse) {
  decode_kv<int8_t>(threads, q, pages_of(pool, scales), pool.dimensions()[1], key_blocks, value_blocks, length, out, lse);
  return ffi::Error::Success();
}

ffi::Error hidden_decode_int8(ffi::ThreadPool threads, Floats q, Codes pool, Floats scales, Numbers blocks,
                              Numbers length, ffi::Result<Floats> out, ffi::Result<Floats> lse, bool as_bfloat16) {
  const auto with = [&]<class X>(X) {
    decode_hidden<X, int8_t>(threads, q, pages_of(pool, scales), pool.dimensions()[1], blocks, length, out, lse);
  };
  if (as_bfloat16)
    with(apt::Factor<apt::BFloat16>{});
  else
    with(float{});
  return ffi::Error::Success();
}

// Only bfloat16 is multiplied as that.
ffi::Error matmul(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer packed, ffi::Result<Floats> out) {
  apt::Team team = team_of(threads);
  const auto sizes = x.dimensions();
  const apt::Kernel kernel{apt::Form::kNumbers, packed.untyped_data()};
  return with_numbers_of(packed, "a kernel", [&]<class Number>(const Number*) {
    return with_numbers_of(x, "rows", [&]<class From>(const From* rows) {
      using As = std::conditional_t<std::is_same_v<From, Number>, apt::Factor<From>, float>;
      apt::matmul<As, Number>(team, rows, sizes[0], kernel, out->dimensions()[1], sizes[1], out->typed_data());
      return ffi::Error::Success();
    });
  });
}

ffi::Error matmul_int8(ffi::ThreadPool threads, ffi::AnyBuffer x, Codes packed, Floats scale,
                       ffi::Result<Floats> out, bool dynamic) {
  apt::Team team = team_of(threads);
  const auto sizes = x.dimensions();
  const apt::Kernel kernel{dynamic ? apt::Form::kAllCodes : apt::Form::kCodes, packed.untyped_data(),
                           scale.typed_data()};
  return with_numbers_of(x, "rows", [&]<class From>(const From* rows) {
    apt::matmul<apt::Factor<From>, apt::Factor<From>>(team, rows, sizes[0], kernel, out->dimensions()[1], sizes[1],
                                                      out->typed_data());
    return ffi::Error::Success();
  });
}

ffi::Error chunk(ffi::ThreadPool threads, Floats q, Floats k, Floats v, Numbers row, ffi::Result<Floats> out,
                 ffi::Result<Floats> lse) {
  apt::Team team = team_of(threads);
  const auto sizes = q.dimensions();
  const int tokens = sizes[0], heads = sizes[1], size = sizes[2];
  const auto chunks = apt::chunks_of(row.typed_data(), tokens);
  apt::attend_chunks<float>(team, chunks, q.typed_data(), heads, size, out->typed_data(), lse->typed_data(),
                     [&](int c, int n, float* keys, float* values) {
                       const auto of_head = [&](const Floats& from) {
                         const float* first = from.typed_data() + (size_t(chunks[c].begin) * heads + n) * size;
                         return [=](int t) { return first + size_t(t) * heads * size; };
                       };
                       apt::pack_keys(chunks[c].keys(), size, of_head(k), keys);
                       apt::pack_values(chunks[c].keys(), size, of_head(v), values);
                     });
  return ffi::Error::Success();
}

// The parameters of layers as a call has them: those of apt::Layer in its order, layer after layer, and after every
// kernel the scales of its outputs and the factors of its inputs. One without numbers is not there. Bit i of `dynamic`
// belongs to a layer's kernel i.
class Parameters {
 public:
  static constexpr size_t kOfLayer = 28;

  Parameters(const ffi::RemainingArgs& all, int64_t dynamic) : all_(all), dynamic_(dynamic) {}

  template <class Number>
  apt::Layer<Number> layer() {
    apt::Layer<Number> own;
    kernel_ = 0;
    next(own.attention_scale), next(own.attention_bias);
    next_kernel<Number>(own.q), next(own.q_bias), next_kernel<Number>(own.k), next(own.k_bias);
    next_kernel<Number>(own.v), next(own.v_bias), next_kernel<Number>(own.out), next(own.out_bias);
    next(own.final_scale), next(own.final_bias);
    next_kernel<Number>(own.fc1), next(own.fc1_bias), next_kernel<Number>(own.fc2), next(own.fc2_bias);
    return own;
  }

  // What was refused first among those that were read.
  const ffi::Error& found() const { return found_; }

 private:
  template <class Number>
  void next(const Number*& to) {
    const auto own = take();
    if (own.element_count() && !is_of<Number>(own)) refuse_here<Number>("a parameter", own);
    to = own.element_count() ? static_cast<const Number*>(own.untyped_data()) : nullptr;
  }

  template <class Number>
  void next_kernel(apt::Kernel& to) {
    const auto own = take();
    const bool codes = own.element_type() == DataType::S8, dynamic = dynamic_ >> kernel_++ & 1;
    if (!codes && !is_of<Number>(own)) refuse_here<Number>("a kernel", own);
    to.form = !codes ? apt::Form::kNumbers : dynamic ? apt::Form::kAllCodes : apt::Form::kCodes;
    to.packed = own.untyped_data();
    next(to.scale), next(to.factor);
  }

  ffi::AnyBuffer take() { return all_.get<ffi::AnyBuffer>(next_++).value(); }

  template <class Number>
  void refuse_here(const char* what, const ffi::AnyBuffer& array) {
    if (found_.success()) found_ = refuse(what, array, std::is_same_v<Number, float> ? "F32 here" : "BF16 here");
  }

  const ffi::RemainingArgs& all_;
  const int64_t dynamic_;
  int kernel_ = 0;
  size_t next_ = 0;
  ffi::Error found_ = ffi::Error::Success();
};

// What calls of all layers have in common.
struct Step {
  ffi::ThreadPool threads;
  ffi::AnyBuffer x;
  Numbers start, length, prompt, last, wanted;
  ffi::Buffer<DataType::PRED> is_hidden;
  Numbers key_or_hidden_blocks, value_blocks;
  ffi::RemainingArgs parameters;
  int64_t heads, ffn, blocks;
  bool norm_first;
  int64_t dynamic;
};

template <class Number, class Cached>
ffi::Error run(Step& own, const apt::Pool<Cached>& pool, int page_tokens, ffi::Result<ffi::AnyBuffer> new_x) {
  if (new_x->untyped_data() != own.x.untyped_data())
    return ffi::Error::Internal("all_layers: x must be updated in place");
  if (own.parameters.size() % Parameters::kOfLayer)
    return ffi::Error::InvalidArgument("all_layers: parameters are missing");
  const apt::StepShape shape{int(own.start.dimensions()[0]),
                             int(own.x.dimensions()[1]),
                             int(own.ffn),
                             int(own.heads),
                             int(own.blocks),
                             page_tokens,
                             int(own.key_or_hidden_blocks.dimensions()[1]),
                             own.norm_first};
  const apt::StepRows rows{own.start.typed_data(), own.length.typed_data(), own.prompt.typed_data(),
                           own.last.typed_data(), own.wanted.typed_data(),
                           own.key_or_hidden_blocks.typed_data(), own.value_blocks.typed_data(),
                           own.is_hidden.typed_data()};
  Parameters read(own.parameters, own.dynamic);
  std::vector<apt::Layer<Number>> layers(own.parameters.size() / Parameters::kOfLayer);
  for (apt::Layer<Number>& layer : layers) layer = read.layer<Number>();
  if (read.found().failure()) return read.found();
  apt::Team team = team_of(own.threads);
  apt::all_layers(team, shape, rows, layers, pool, static_cast<Number*>(new_x->untyped_data()));
  return ffi::Error::Success();
}

ffi::Error all_layers(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer pool, Numbers start, Numbers length,
                      Numbers prompt, Numbers last, Numbers wanted, ffi::Buffer<DataType::PRED> is_hidden, Numbers key_or_hidden_blocks,
                      Numbers value_blocks, ffi::RemainingArgs parameters, ffi::Result<ffi::AnyBuffer> new_x,
                      ffi::Result<ffi::AnyBuffer> new_pool, int64_t heads, int64_t ffn, int64_t blocks, bool norm_first,
                      int64_t dynamic) {
  if (new_pool->untyped_data() != pool.untyped_data())
    return ffi::Error::Internal("all_layers: the pool must be updated in place");
  Step step{threads, x, start, length, prompt, last, wanted, is_hidden, key_or_hidden_blocks, value_blocks, parameters,
                  heads, ffn, blocks, norm_first, dynamic};
  return with_numbers_of(x, "a residual stream", [&]<class Number>(const Number*) {
    if (!is_of<Number>(pool)) return refuse("a pool", pool, "the residual stream's type");
    const apt::Pool<Number> numbers{static_cast<Number*>(new_pool->untyped_data())};
    return run<Number>(step, numbers, pool.dimensions()[1], new_x);
  });
}

// `channels` has no numbers where no vectors are hidden.
ffi::Error all_layers_int8(ffi::ThreadPool threads, ffi::AnyBuffer x, Codes pool, Floats scales, Counts outside,
                           Floats channels, Numbers start, Numbers length, Numbers prompt, Numbers last, Numbers wanted,
                           ffi::Buffer<DataType::PRED> is_hidden, Numbers key_or_hidden_blocks, Numbers value_blocks,
                           ffi::RemainingArgs parameters, ffi::Result<ffi::AnyBuffer> new_x,
                           ffi::Result<Codes> new_pool, ffi::Result<Floats> new_scales, ffi::Result<Counts> new_outside,
                           int64_t heads, int64_t ffn, int64_t blocks, bool norm_first, int64_t dynamic) {
  if (new_pool->typed_data() != pool.typed_data() || new_scales->typed_data() != scales.typed_data() ||
      new_outside->typed_data() != outside.typed_data())
    return ffi::Error::Internal("all_layers_int8: the pool must be updated in place");
  Step step{threads, x, start, length, prompt, last, wanted, is_hidden, key_or_hidden_blocks, value_blocks, parameters,
                  heads, ffn, blocks, norm_first, dynamic};
  const apt::Pool<int8_t> codes{new_pool->typed_data(), new_scales->typed_data(), int(scales.dimensions()[2]),
                                channels.element_count() ? channels.typed_data() : nullptr,
                                new_outside->typed_data()};
  return with_numbers_of(x, "a residual stream", [&]<class Number>(const Number*) {
    return run<Number>(step, codes, pool.dimensions()[1], new_x);
  });
}

apt::Relays relays;

// Gives the host an iteration's results, and the device what the next one works on, if one follows.
ffi::Error hand_over(Numbers relay, ffi::RemainingArgs results, ffi::Result<ffi::Buffer<DataType::PRED>> follows,
                     ffi::RemainingRets next) {
  const auto own = relays.find(relay.typed_data()[0]);
  const auto write = [&](std::vector<char>& to) {
    char* at = to.data();
    for (size_t i = 0; i < results.size(); i++) {
      const auto from = results.get<ffi::AnyBuffer>(i).value();
      at = std::copy_n(static_cast<const char*>(from.untyped_data()), from.size_bytes(), at);
    }
  };
  const auto read = [&](const std::vector<char>& from) {
    const char* at = from.data();
    for (size_t i = 0; i < next.size(); i++) {
      const auto to = next.get<ffi::AnyBuffer>(i).value();
      std::copy_n(at, to->size_bytes(), static_cast<char*>(to->untyped_data()));
      at += to->size_bytes();
    }
  };
  *follows->typed_data() = own && own->hand_over(write, read);
  return ffi::Error::Success();
}

}  // namespace

// See apt_jax/cpu_kernels/relay.py.
extern "C" int apt_open_relay(size_t input_bytes, size_t result_bytes, double grace_s) {
  return relays.open(input_bytes, result_bytes, grace_s);
}
extern "C" void apt_close_relay(int number) { relays.close(number); }
extern "C" void apt_end(int number) {
  if (const auto own = relays.find(number)) own->end();
}
extern "C" bool apt_give(int number, const char* input) {
  const auto own = relays.find(number);
  return own && own->give([&](std::vector<char>& to) { std::copy_n(input, to.size(), to.data()); });
}
extern "C" const char* apt_wait(int number, int iteration, double seconds) {
  const auto own = relays.find(number);
  return own ? own->wait(iteration, seconds) : nullptr;
}

// Of a call's threads, the caller included, at most so many work.
extern "C" void apt_limit_threads(int threads) { most_threads.store(threads, std::memory_order_relaxed); }

// Whether AMX multiplies from now on, if it is wanted; while nothing runs.
extern "C" bool apt_use_amx(bool wanted) { return apt::use_amx(wanted); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_kv_decode, kv_decode,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<ffi::AnyBuffer>().Arg<Numbers>()
                                  .Arg<Numbers>().Arg<Numbers>().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_hidden_decode, hidden_decode,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<ffi::AnyBuffer>().Arg<Numbers>()
                                  .Arg<Numbers>().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_kv_decode_int8, kv_decode_int8,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Codes>().Arg<Floats>()
                                  .Arg<Numbers>().Arg<Numbers>().Arg<Numbers>().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_hidden_decode_int8, hidden_decode_int8,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Codes>().Arg<Floats>()
                                  .Arg<Numbers>().Arg<Numbers>().Ret<Floats>().Ret<Floats>().Attr<bool>("as_bfloat16"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_matmul, matmul,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_matmul_int8, matmul_int8,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<Codes>().Arg<Floats>()
                                  .Ret<Floats>().Attr<bool>("dynamic"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_chunk, chunk,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
                                  .Arg<Numbers>().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_all_layers, all_layers,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                                  .Arg<Numbers>().Arg<Numbers>().Arg<Numbers>().Arg<Numbers>().Arg<Numbers>()
                                  .Arg<ffi::Buffer<DataType::PRED>>().Arg<Numbers>().Arg<Numbers>().RemainingArgs()
                                  .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("heads").Attr<int64_t>("ffn").Attr<int64_t>("blocks")
                                  .Attr<bool>("norm_first").Attr<int64_t>("dynamic"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_all_layers_int8, all_layers_int8,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<Codes>().Arg<Floats>()
                                  .Arg<Counts>().Arg<Floats>()
                                  .Arg<Numbers>().Arg<Numbers>().Arg<Numbers>().Arg<Numbers>().Arg<Numbers>()
                                  .Arg<ffi::Buffer<DataType::PRED>>().Arg<Numbers>().Arg<Numbers>().RemainingArgs()
                                  .Ret<ffi::AnyBuffer>().Ret<Codes>().Ret<Floats>().Ret<Counts>()
                                  .Attr<int64_t>("heads").Attr<int64_t>("ffn").Attr<int64_t>("blocks")
                                  .Attr<bool>("norm_first").Attr<int64_t>("dynamic"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_hand_over, hand_over,
                              ffi::Ffi::Bind().Arg<Numbers>().RemainingArgs().Ret<ffi::Buffer<DataType::PRED>>()
                                  .RemainingRets());
