// The functions that XLA calls.
#include "attention.h"
#include "chunk.h"
#include "matmul.h"

namespace ffi = xla::ffi;
using ffi::DataType;

namespace {

template <class Use>
void with_numbers_of(const ffi::AnyBuffer& array, const Use& use) {
  if (array.element_type() == DataType::F32)
    use(static_cast<const float*>(array.untyped_data()));
  else
    use(static_cast<const apt::BFloat16*>(array.untyped_data()));
}

using Floats = ffi::Buffer<DataType::F32>;
using Numbers = ffi::Buffer<DataType::S32>;

ffi::Error kv_decode(ffi::ThreadPool threads, Floats q, ffi::AnyBuffer pool, Numbers key_blocks, Numbers value_blocks,
                     Numbers length, ffi::Result<Floats> out, ffi::Result<Floats> lse) {
  const auto sizes = q.dimensions();
  const apt::Shape shape{int(sizes[0]), int(sizes[1]), int(pool.dimensions()[2]), int(pool.dimensions()[1]),
                         int(key_blocks.dimensions()[1])};
  with_numbers_of(pool, [&](auto* numbers) {
    apt::kv_decode(threads, shape, q.typed_data(), numbers, key_blocks.typed_data(), value_blocks.typed_data(),
                   length.typed_data(), out->typed_data(), lse->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error hidden_decode(ffi::ThreadPool threads, Floats q, ffi::AnyBuffer pool, Numbers blocks, Numbers length,
                         ffi::Result<Floats> out, ffi::Result<Floats> lse) {
  const auto sizes = q.dimensions();
  const apt::Shape shape{int(sizes[0]), int(sizes[1]), int(sizes[2]), int(pool.dimensions()[1]),
                         int(blocks.dimensions()[1])};
  with_numbers_of(pool, [&](auto* numbers) {
    apt::hidden_decode(threads, shape, q.typed_data(), numbers, blocks.typed_data(), length.typed_data(),
                       out->typed_data(), lse->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error matmul(ffi::ThreadPool threads, Floats x, ffi::AnyBuffer panels, ffi::Result<Floats> out) {
  with_numbers_of(panels, [&](auto* numbers) {
    apt::matmul(threads, x.typed_data(), x.dimensions()[0], numbers, out->dimensions()[1], x.dimensions()[1],
                out->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error chunk(ffi::ThreadPool threads, Floats q, Floats k, Floats v, Numbers row, ffi::Result<Floats> out,
                 ffi::Result<Floats> lse) {
  const auto sizes = q.dimensions();
  apt::attend_chunk(threads, q.typed_data(), k.typed_data(), v.typed_data(), row.typed_data(), sizes[0], sizes[1],
                    sizes[2], out->typed_data(), lse->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_kv_decode, kv_decode,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<ffi::AnyBuffer>().Arg<Numbers>()
                                  .Arg<Numbers>().Arg<Numbers>().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_hidden_decode, hidden_decode,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<ffi::AnyBuffer>().Arg<Numbers>()
                                  .Arg<Numbers>().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_matmul, matmul,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<ffi::AnyBuffer>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(apt_chunk, chunk,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
                                  .Arg<Numbers>().Ret<Floats>().Ret<Floats>());
