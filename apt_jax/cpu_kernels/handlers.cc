// The functions that XLA calls.
#include "attention.h"
#include "chunk.h"
#include "layers.h"
#include "matmul.h"

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

ffi::Error matmul(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer packed, ffi::Result<Floats> out) {
  apt::Team team = team_of(threads);
  const auto sizes = x.dimensions();
  with_numbers_of(packed, [&](auto* numbers) {
    with_numbers_of(x, [&](auto* rows) {
      apt::matmul(team, rows, sizes[0], numbers, out->dimensions()[1], sizes[1], out->typed_data());
    });
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

// `parameters` are those of apt::Layer, in its order, layer after layer; one without numbers is not there.
ffi::Error all_layers(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer pool, Numbers start, Numbers length,
                      Numbers last, Numbers wanted, ffi::Buffer<DataType::PRED> is_hidden, Numbers key_or_hidden_blocks,
                      Numbers value_blocks, ffi::RemainingArgs parameters, ffi::Result<ffi::AnyBuffer> new_x,
                      ffi::Result<ffi::AnyBuffer> new_pool, int64_t heads, int64_t ffn, int64_t blocks,
                      bool norm_first) {
  constexpr size_t kOfLayer = sizeof(apt::Layer<float>) / sizeof(float*);
  if (new_x->untyped_data() != x.untyped_data() || new_pool->untyped_data() != pool.untyped_data())
    return ffi::Error::Internal("all_layers: x and pool must be updated in place");
  if (parameters.size() % kOfLayer) return ffi::Error::InvalidArgument("all_layers: parameters are missing");
  const apt::StepShape shape{int(start.dimensions()[0]),        int(x.dimensions()[1]),
                             int(ffn),                          int(heads),
                             int(blocks),                       int(pool.dimensions()[1]),
                             int(key_or_hidden_blocks.dimensions()[1]), norm_first};
  const apt::StepRows rows{start.typed_data(),  length.typed_data(),       last.typed_data(),
                           wanted.typed_data(), key_or_hidden_blocks.typed_data(), value_blocks.typed_data(),
                           is_hidden.typed_data()};
  apt::Team team = team_of(threads);
  with_numbers_of(pool, [&](auto* numbers) {
    using Number = std::remove_const_t<std::remove_pointer_t<decltype(numbers)>>;
    std::vector<apt::Layer<Number>> layers(parameters.size() / kOfLayer);
    for (size_t i = 0; i < parameters.size(); i++) {
      const auto own = parameters.get<ffi::AnyBuffer>(i).value();
      const auto* at = own.element_count() ? static_cast<const Number*>(own.untyped_data()) : nullptr;
      std::memcpy(reinterpret_cast<char*>(layers.data()) + i * sizeof at, &at, sizeof at);
    }
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
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_chunk, chunk,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
                                  .Arg<Numbers>().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_all_layers, all_layers,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                                  .Arg<Numbers>().Arg<Numbers>().Arg<Numbers>().Arg<Numbers>()
                                  .Arg<ffi::Buffer<DataType::PRED>>().Arg<Numbers>().Arg<Numbers>().RemainingArgs().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("heads").Attr<int64_t>("ffn").Attr<int64_t>("blocks")
                                  .Attr<bool>("norm_first"));
