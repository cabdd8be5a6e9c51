// The functions that XLA calls.
#include "attention.h"
#include "chunk.h"
#include "layers.h"
#include "products.h"

#include <algorithm>
#include <atomic>
#include <limits>
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

template <class Use>
void with_numbers_of(const ffi::AnyBuffer& array, const Use& use) {
  if (array.element_type() == DataType::F32)
    use(static_cast<const float*>(array.untyped_data()));
  else
    use(static_cast<const apt::BFloat16*>(array.untyped_data()));
}

using Floats = ffi::Buffer<DataType::F32>;
using Numbers = ffi::Buffer<DataType::S32>;

// The table of row r of `blocks [rows, pages]`, by r.
auto tables(const Numbers& blocks) {
  return [first = blocks.typed_data(), pages = blocks.dimensions()[1]](int r) { return first + r * pages; };
}

ffi::Error kv_decode(ffi::ThreadPool threads, Floats q, ffi::AnyBuffer pool, Numbers key_blocks, Numbers value_blocks,
                     Numbers length, ffi::Result<Floats> out, ffi::Result<Floats> lse) {
  apt::Team team = team_of(threads);
  const auto sizes = q.dimensions();
  const apt::Shape shape{int(sizes[0]), int(sizes[1]), int(pool.dimensions()[2]), int(pool.dimensions()[1])};
  with_numbers_of(pool, [&](auto* numbers) {
    apt::kv_decode(team, shape, q.typed_data(), numbers, tables(key_blocks), tables(value_blocks), length.typed_data(),
                   out->typed_data(), lse->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error hidden_decode(ffi::ThreadPool threads, Floats q, ffi::AnyBuffer pool, Numbers blocks, Numbers length,
                         ffi::Result<Floats> out, ffi::Result<Floats> lse) {
  apt::Team team = team_of(threads);
  const auto sizes = q.dimensions();
  const apt::Shape shape{int(sizes[0]), int(sizes[1]), int(sizes[2]), int(pool.dimensions()[1])};
  with_numbers_of(pool, [&](auto* numbers) {
    apt::hidden_decode(team, shape, q.typed_data(), numbers, tables(blocks), length.typed_data(), out->typed_data(),
                       lse->typed_data());
  });
  return ffi::Error::Success();
}

// Only bfloat16 is multiplied as that.
ffi::Error matmul(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer packed, ffi::Result<Floats> out) {
  apt::Team team = team_of(threads);
  const auto sizes = x.dimensions();
  const apt::Kernel kernel{apt::Form::kNumbers, packed.untyped_data()};
  with_numbers_of(packed, [&]<class Number>(const Number*) {
    with_numbers_of(x, [&]<class From>(const From* rows) {
      using As = std::conditional_t<std::is_same_v<From, Number>, apt::Factor<From>, float>;
      apt::matmul<As, Number>(team, rows, sizes[0], kernel, out->dimensions()[1], sizes[1], out->typed_data());
    });
  });
  return ffi::Error::Success();
}

ffi::Error matmul_int8(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::Buffer<DataType::S8> packed, Floats scale,
                       ffi::Result<Floats> out, bool dynamic) {
  apt::Team team = team_of(threads);
  const auto sizes = x.dimensions();
  const apt::Kernel kernel{dynamic ? apt::Form::kAllCodes : apt::Form::kCodes, packed.untyped_data(),
                           scale.typed_data()};
  with_numbers_of(x, [&]<class From>(const From* rows) {
    apt::matmul<apt::Factor<From>, apt::Factor<From>>(team, rows, sizes[0], kernel, out->dimensions()[1], sizes[1],
                                                      out->typed_data());
  });
  return ffi::Error::Success();
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
    next(own.q), next(own.q_bias), next(own.k), next(own.k_bias), next(own.v), next(own.v_bias);
    next(own.out), next(own.out_bias), next(own.final_scale), next(own.final_bias);
    next(own.fc1), next(own.fc1_bias), next(own.fc2), next(own.fc2_bias);
    return own;
  }

 private:
  template <class Number>
  void next(const Number*& to) {
    const auto own = all_.get<ffi::AnyBuffer>(next_++).value();
    to = own.element_count() ? static_cast<const Number*>(own.untyped_data()) : nullptr;
  }

  void next(apt::Kernel& to) {
    const bool codes = all_.get<ffi::AnyBuffer>(next_).value().element_type() == DataType::S8;
    const bool dynamic = dynamic_ >> kernel_++ & 1;
    to.form = !codes ? apt::Form::kNumbers : dynamic ? apt::Form::kAllCodes : apt::Form::kCodes;
    const char* packed;
    next(packed), next(to.scale), next(to.factor);
    to.packed = packed;
  }

  const ffi::RemainingArgs& all_;
  const int64_t dynamic_;
  int kernel_ = 0;
  size_t next_ = 0;
};

ffi::Error all_layers(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer pool, Numbers start, Numbers length,
                      Numbers last, Numbers wanted, ffi::Buffer<DataType::PRED> is_hidden, Numbers key_or_hidden_blocks,
                      Numbers value_blocks, ffi::RemainingArgs parameters, ffi::Result<ffi::AnyBuffer> new_x,
                      ffi::Result<ffi::AnyBuffer> new_pool, int64_t heads, int64_t ffn, int64_t blocks,
                      bool norm_first, int64_t dynamic) {
  if (new_x->untyped_data() != x.untyped_data() || new_pool->untyped_data() != pool.untyped_data())
    return ffi::Error::Internal("all_layers: x and pool must be updated in place");
  if (parameters.size() % Parameters::kOfLayer) return ffi::Error::InvalidArgument("all_layers: parameters are missing");
  const apt::StepShape shape{int(start.dimensions()[0]),        int(x.dimensions()[1]),
                             int(ffn),                          int(heads),
                             int(blocks),                       int(pool.dimensions()[1]),
                             int(key_or_hidden_blocks.dimensions()[1]), norm_first};
  const apt::StepRows rows{start.typed_data(),  length.typed_data(),       last.typed_data(),
                           wanted.typed_data(), key_or_hidden_blocks.typed_data(), value_blocks.typed_data(),
                           is_hidden.typed_data()};
  apt::Team team = team_of(threads);
  with_numbers_of(pool, [&]<class Number>(const Number*) {
    Parameters read(parameters, dynamic);
    std::vector<apt::Layer<Number>> layers(parameters.size() / Parameters::kOfLayer);
    for (apt::Layer<Number>& own : layers) own = read.layer<Number>();
    apt::all_layers(team, shape, rows, layers, static_cast<Number*>(new_pool->untyped_data()),
                    static_cast<Number*>(new_x->untyped_data()));
  });
  return ffi::Error::Success();
}

}  // namespace

// Of a call's threads, the caller included, at most so many work.
extern "C" void apt_limit_threads(int threads) { most_threads.store(threads, std::memory_order_relaxed); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_kv_decode, kv_decode,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<ffi::AnyBuffer>().Arg<Numbers>()
                                  .Arg<Numbers>().Arg<Numbers>().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_hidden_decode, hidden_decode,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<ffi::AnyBuffer>().Arg<Numbers>()
                                  .Arg<Numbers>().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_matmul, matmul,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_matmul_int8, matmul_int8,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<DataType::S8>>().Arg<Floats>().Ret<Floats>().Attr<bool>("dynamic"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_chunk, chunk,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
                                  .Arg<Numbers>().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_all_layers, all_layers,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                                  .Arg<Numbers>().Arg<Numbers>().Arg<Numbers>().Arg<Numbers>()
                                  .Arg<ffi::Buffer<DataType::PRED>>().Arg<Numbers>().Arg<Numbers>().RemainingArgs().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("heads").Attr<int64_t>("ffn").Attr<int64_t>("blocks")
                                  .Attr<bool>("norm_first").Attr<int64_t>("dynamic"));
