// What a CPU build of torch lacks to run autograd on fake CUDA tensors (torch._subclasses.fake_tensor), for
// benchmarks/fake_gpu.py: a guard for a device that does nothing, and that there is such a device. Without them the first
// node of a graph ends the process (torch 2.13). Nothing is ever computed.
//
// Loaded before libtorch_cpu, whose own two functions of these names it then replaces.

#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceType;
using c10::Stream;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device device() { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return device(); }
  Device getDevice() const override { return device(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, device()); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, device()); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, device()); }
};

c10::impl::DeviceGuardImplRegistrar registered(DeviceType::CUDA, new Guard);

struct Hooks final : at::CUDAHooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

}  // namespace

namespace at::detail {

const CUDAHooksInterface& getCUDAHooks() {
  static const Hooks hooks;
  return hooks;
}

}  // namespace at::detail

namespace at::accelerator {

std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; }

}  // namespace at::accelerator
