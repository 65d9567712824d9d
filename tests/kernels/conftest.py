import pytest
import triton_process


def process(module, environment):
    if triton_process.MISSING:
        pytest.skip(triton_process.MISSING)
    started = triton_process.TritonProcess(module, environment)
    yield started
    started.close()


@pytest.fixture(scope="session")
def interpreted():
    """Calls a function of interpreted_cases.py in a process where kernels run in Triton's interpreter, on CPU
    tensors."""
    yield from process("interpreted_cases", {"TRITON_INTERPRET": "1"})


@pytest.fixture(scope="session")
def dispatched():
    """Calls a function of dispatch_cases.py in a process where faststeer.ops has the interpreted kernels."""
    yield from process("dispatch_cases", {"TRITON_INTERPRET": "1", "FASTSTEER_BACKEND": "auto"})


@pytest.fixture(scope="session")
def compiled():
    """Calls a function of compiled_cases.py in a process where kernels are compiled as for a GPU."""
    yield from process("compiled_cases", {"TRITON_INTERPRET": "0"})
