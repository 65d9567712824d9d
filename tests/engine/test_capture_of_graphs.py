"""Captured decode steps, without a GPU: a capture is simulated by recording every operator with the very tensors that
it was given, and a replay runs them again on these. Like a CUDA graph it reads addresses, and knows nothing of weights,
hooks or adapters that came later."""

from __future__ import annotations

import contextlib
import types

import models
import pytest
import torch
from support import LIMITS, engine, generated, mixed, plan, prompts, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import faststeer as fs
from faststeer.engine import linear, sampling
from faststeer.engine.graphs import CudaCaptures, Graphs, NotCapturable, _NoHostReads, model_constants


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Simulated:
    """Captures by recording. `error` is raised in the middle of a capture; what the graph had then is lost."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.captured, self.replayed, self.cleared, self.error = 0, 0, 0, error

    def warm_up(self, step) -> None:
        step()

    def capture(self, step):
        self.captured += 1
        recording = Recording()
        with recording:
            chosen = step()
        if self.error is not None:
            raise self.error

        def replay() -> None:
            self.replayed += 1
            recording.replay()

        return replay, chosen

    def clear(self) -> None:
        self.cleared += 1


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """What a GPU's step is made of: operators of torch, no NumPy, none of the CPU's own products."""

    def top(logits):
        token = logits.argmax(-1)
        return logits.gather(-1, token.unsqueeze(-1)).squeeze(-1), token

    monkeypatch.setattr(sampling, "top", top)
    monkeypatch.setattr(linear, "is_faster", lambda weight: False)


def graphed(model, captures=None, **more):
    made = engine(model, **more)
    captures = captures or Simulated()
    made._steps = Graphs(made._batch, captures)
    return made, captures


def expected(model, plans=None, asked=None, limits=LIMITS):
    asked = asked or prompts()
    return [generated(model, *each) for each in zip(asked, plans or [None] * len(asked), limits, strict=False)]


# Replays --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in models.ARCHITECTURES if name not in models.EXPERTS | {"falcon"}])
def test_replayed_steps_give_the_tokens_of_generate(name):
    """Plans, rows and widths change between replays."""
    made, captures = graphed(name)
    assert (made.path, made.why) == ("graphs", "")
    for plans in (mixed(name), [plan(name, 3), None] * 4):
        assert tokens(made.generate(prompts(), plans=plans, max_new_tokens=LIMITS)) == expected(
            models.model(name), plans
        )
    assert (made.path, made.why) == ("graphs", "")
    assert captures.replayed > 2 * captures.captured > 0


def test_the_second_call_captures_nothing():
    made, captures = graphed("llama")
    settings = {"plans": mixed("llama"), "max_new_tokens": LIMITS, "probe": models.direction(1)}
    first = list(made.generate(prompts(), **settings))
    captured = captures.captured
    second = list(made.generate(prompts(), **settings))
    assert captures.captured == captured and [c.token_ids for c in first] == [c.token_ids for c in second]
    plain, _ = graphed("llama")
    made._steps = plain._steps
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.projections, b.projections)


# Warming up -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [{}, {"probe": models.direction(1)}, {"temperature": 0.7}, {"temperature": 0.7, "top_k": 5}],
    ids=["greedy", "probe", "temperature", "top_k"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nothing_is_captured_after_a_warmup(name, more):
    """For any number of rows, any length and other plans as far as those given; and it changes no answer."""
    sizes = {"max_batch": 5, "max_length": 300}
    model = models.build(name, max_position_embeddings=512)
    settings = {"plans": mixed(name), "max_new_tokens": LIMITS, "seed": 3, **more}
    asked = [*prompts()[:-1], models.tokens(1, 280, seed=9)[0].tolist()]
    made, captures = graphed(model, **sizes)
    before = [(c.token_ids, c.projections) for c in made.generate(asked, **settings)]
    made, captures = graphed(model, **sizes)
    random = torch.get_rng_state()
    assert made.warmup(mixed(name), **more) is None
    assert torch.equal(torch.get_rng_state(), random)
    # 1, 2, 4 and 5 rows, each at 128, 256 and 300 columns.
    assert captures.captured == 12 and (made.path, made.why) == ("graphs", "")
    for (ids, projections), again in zip(before, made.generate(asked, **settings), strict=True):
        assert ids == again.token_ids
        if projections is not None:
            torch.testing.assert_close(again.projections, projections, rtol=1e-4, atol=1e-4)
    others = settings | {"plans": [plan(name, 5), None, plan(name, 6)], "max_new_tokens": LIMITS[:3]}
    list(made.generate(asked[:3], **others))
    assert captures.captured == 12 and captures.replayed > 12
    assert not fs.hf.steering.is_steered(made.model)


def test_a_warmup_of_what_cannot_be_captured():
    """It says why and leaves eager steps; what is refused is refused before anything runs."""
    made, captures = graphed("llama", Simulated(RuntimeError("operation not permitted")))
    made.warmup(plan("llama"))
    assert (made.path, captures.captured, captures.replayed) == ("eager", 1, 0) and "not permitted" in made.why
    assert tokens(made.generate(prompts(), max_new_tokens=LIMITS)) == expected(models.model("llama"))
    made, captures = graphed("llama")
    running = made.generate(prompts(), max_new_tokens=4)
    next(running)
    captured = captures.captured
    with pytest.raises(RuntimeError, match="generating already"):
        made.warmup()
    running.close()
    for wrong, error, message in (
        ({"plans": [3]}, TypeError, "plans\\[0\\] is a int"),
        ({"plans": []}, ValueError, "plans is an empty list"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"top_k": 1.5}, ValueError, "top_k"),
        ({"plans": fs.Plan([fs.Add(models.direction(0), layers=99)])}, ValueError, "layer 99"),
    ):
        with pytest.raises(error, match=message):
            made.warmup(**wrong)
    assert captures.captured == captured
    made._steps._captures.capture = lambda step: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    made._steps._drop()
    with pytest.raises(torch.OutOfMemoryError):
        made.warmup(plan("llama"))
    assert not made._busy and not fs.hf.steering.is_steered(made.model)


def test_a_warmup_on_a_cpu_loads_the_plans():
    made = engine("llama")
    made.warmup(mixed("llama"), probe=models.direction(1))
    made.warmup()
    assert made.path == "eager" and made._capacity.slots == 3
    plans = mixed("llama")
    assert tokens(made.generate(prompts(), plans=plans, max_new_tokens=LIMITS)) == expected(
        models.model("llama"), plans
    )


def test_kernels_are_compiled_where_triton_runs(monkeypatch):
    pytest.importorskip("triton")
    compiled = []
    monkeypatch.setattr("faststeer.kernels.warmup", lambda *where, operators: compiled.append((*where, operators)))
    for backend, device in (("cuda", "cuda"), ("triton", "cpu"), ("triton", "cuda")):
        monkeypatch.setattr(fs.ops.dispatch, "backend_for", lambda _, backend=backend: backend)
        fs.ops.warmup(64, torch.bfloat16, device, ("steer",))
    assert compiled == [(64, torch.bfloat16, "cuda", ("steer",))]


# What a graph holds fixed ---------------------------------------------------------------------------------------------


class Adapter(torch.nn.Module):
    """A linear layer and a change of it, on or off by an attribute."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.active, self.scaling = layer, ["default"], {"default": 1.0}

    def forward(self, x):
        y = self.base_layer(x)
        for name in self.active:
            y = y + self.scaling[name]
        return y


def new_parameter(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().flip(0))


def new_data(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data = layer.weight.data.flip(0)


def new_buffer(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2


def new_module(model):
    mlp = model.model.layers[0].mlp
    mlp.down_proj = Adapter(mlp.down_proj)


def hook(model):
    return model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _m, _a, out: out + 1.0)


def own_forward(model):
    layer = model.model.layers[0].mlp.down_proj
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight) * 1.5


def adapter_off(model):
    model.model.layers[1].mlp.down_proj.active = []


def adapter_scaled(model):
    model.model.layers[1].mlp.down_proj.scaling["default"] = 3.0


CHANGES = [new_parameter, new_data, new_buffer, new_module, hook, own_forward, adapter_off, adapter_scaled]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_after_a_capture_is_captured_anew(change):
    model = models.build("llama")
    model.model.layers[1].mlp.down_proj = Adapter(model.model.layers[1].mlp.down_proj)
    made, captures = graphed(model)
    before = tokens(made.generate(prompts(), max_new_tokens=LIMITS))
    assert before == expected(model)
    captured = captures.captured
    change(model)
    after = tokens(made.generate(prompts(), max_new_tokens=LIMITS))
    assert after == expected(model) != before
    assert captures.captured > captured and made.path == "graphs"


def test_a_change_while_completions_are_read():
    model = models.build("llama")
    made, _ = graphed(model, max_batch=2)
    asked = {"asked": prompts()[:4], "limits": [6] * 4}
    plainly, handle = expected(model, **asked), hook(model)
    hooked = expected(model, **asked)
    handle.remove()
    running = made.generate(prompts()[:4], max_new_tokens=6)
    first = [next(running), next(running)]  # two rows: the others have not begun
    hook(model)
    assert tokens([*first, *running]) == plainly[:2] + hooked[2:]


def test_adapters_of_peft_that_are_switched():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(models.build("llama"), lora).eval()
    made, captures = graphed(model.base_model.model)
    found, tokens_of = [], []
    for switch in (model.enable_adapter_layers, model.disable_adapter_layers, model.enable_adapter_layers):
        switch()
        before = captures.captured
        found.append(tokens(made.generate(prompts(), max_new_tokens=LIMITS)))
        tokens_of.append(expected(model.base_model.model))
        assert captures.captured > before
    assert found == tokens_of and found[0] == found[2] != found[1]


def test_steering_that_is_entered_again_is_the_same_to_a_graph():
    model, steered = models.build("llama"), plan("llama")
    with fs.steer(model, steered):
        first = model_constants(model)
    with fs.steer(model, steered):
        assert model_constants(model) == first
    hook(model)
    with fs.steer(model, steered):
        assert model_constants(model) != first


# Captures that fail ---------------------------------------------------------------------------------------------------


def test_a_step_that_reads_the_device_runs_eagerly():
    """Falcon indexes by a list; a dynamic rotation asks for the length, as this hook does: nothing is even tried on the
    device."""
    asking = models.build("llama")
    asking.model.norm.register_forward_pre_hook(lambda _m, args: None if args[0].amax() < 1e9 else 1 / 0)
    for model, reason in ((models.model("falcon"), "copies numbers"), (asking, "reads a number of the device")):
        made, captures = graphed(model)
        assert tokens(made.generate(prompts(), max_new_tokens=LIMITS)) == expected(model)
        assert made.path == "eager" and "cannot be captured" in made.why and reason in made.why
        assert captures.captured == captures.replayed == 0


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_length(kind):
    """Captured or not, as the version of transformers computes them; the tokens are right."""
    factors = {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 128}
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, **(factors if kind == "longrope" else {})}
    model = models.build("llama", rope_parameters=rope, max_position_embeddings=256)
    made, _ = graphed(model)
    assert tokens(made.generate(prompts(), max_new_tokens=LIMITS)) == expected(model)


def test_a_step_that_changes_attributes_runs_eagerly():
    """A counter, say, that a replay would leave where it is."""
    model = models.build("llama")
    model.model.layers[0].mlp.passes = 0
    model.model.layers[0].mlp.register_forward_hook(lambda module, *_: setattr(module, "passes", module.passes + 1))
    made, captures = graphed(model)
    assert tokens(made.generate(prompts(), max_new_tokens=LIMITS)) == expected(model)
    assert made.path == "eager" and "model.layers.0.mlp.passes" in made.why and captures.captured == 0


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_capture_that_fails_leaves_everything_as_it_was(name):
    """In the middle of a step, with plans, gates and probes on; and it is tried again once something has changed."""
    model = models.build(name)
    settings = {"plans": mixed(name), "max_new_tokens": LIMITS, "probe": models.direction(1), "seed": 3}
    right = list(engine(model).generate(prompts(), **settings))
    made, captures = graphed(model, Simulated(RuntimeError("operation not permitted\nwhen stream is capturing")))
    random = torch.get_rng_state()
    for _ in range(2):
        again = list(made.generate(prompts(), **settings))
        for a, b in zip(again, right, strict=True):
            assert a.token_ids == b.token_ids
            torch.testing.assert_close(a.projections, b.projections, rtol=1e-4, atol=1e-4)
    assert made.why == "a decode step cannot be captured as a CUDA graph: operation not permitted"
    assert made.path == "eager" and captures.captured == 1 and captures.cleared and not made._steps._graphs
    assert torch.equal(torch.get_rng_state(), random) and not made._steering.projections
    captures.error = None
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert tokens(made.generate(prompts(), plans=mixed(name), max_new_tokens=LIMITS)) == [c.token_ids for c in right]
    assert made.path == "graphs" and made.why == "" and captures.replayed


def test_tables_after_a_failed_capture():
    """Bit for bit what an eager step would have met: the rows have not moved on, their gates are undecided."""
    made, _ = graphed("llama", Simulated(RuntimeError("no")))
    batch, steps = made._batch, []

    def watch(n, width, mode):
        steps.append([t.clone() for t in (batch.long, batch.int, batch.real)])
        return type(batch).decode(batch, n, width, mode)

    batch.decode = watch
    list(made.generate(prompts()[:3], plans=mixed("llama")[:3], max_new_tokens=4))
    # Warm-up, rehearsal, capture and the eager step behind them all begin at the same place; the next does not.
    for other in steps[1:4]:
        assert all(map(torch.equal, steps[0], other))
    assert not torch.equal(steps[0][0], steps[4][0])


def test_out_of_memory_in_a_capture_lowers_the_batch():
    made, captures = graphed("llama", Simulated(torch.OutOfMemoryError("CUDA out of memory")), max_batch=4)
    capture = captures.capture

    def small(step):
        captures.error = torch.OutOfMemoryError("CUDA out of memory") if len(made._batch.live_rows) > 2 else None
        return capture(step)

    made._batch.live_rows = []
    decode = made._batch.decode
    made._batch.decode = lambda n, *more: (setattr(made._batch, "live_rows", range(n)), decode(n, *more))[1]
    captures.capture = small
    plans = mixed("llama")
    assert tokens(made.generate(prompts(), plans=plans, max_new_tokens=LIMITS)) == expected(
        models.model("llama"), plans
    )
    assert made.path == "graphs" and captures.replayed


@torch.inference_mode()
@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda x: x.sum().item(), "reads a number"),
        (lambda x: bool(x.any()), "reads a number"),
        (lambda x: x.nonzero(), "size depends"),
        (lambda x: x[x > 0], "by a mask"),
        (lambda x: torch.tensor([1.0]), "copies numbers from the host"),
        (lambda x: x[[0, 1]], "copies numbers from the host"),
        (lambda x: x.to("meta"), "copies from cpu to meta"),
    ],
)
def test_what_a_graph_cannot_do_is_noticed(read, reason):
    x = torch.ones(3)
    with pytest.raises(NotCapturable, match=reason), _NoHostReads(x.device):
        read(x)
    with _NoHostReads(x.device):
        x[:, None].to(torch.bfloat16).float()[torch.arange(2)].masked_fill_(torch.ones(2, 1, dtype=torch.bool), 2.0)


# torch.cuda -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda's part in a capture: who has the allocator, which stream is current, the generator's state."""
    now = types.SimpleNamespace(pool=None, users=0, stream="main", state="clean", fails=True, mode=None)

    class Generator:
        def __init__(self, name="clean"):
            self.name = name

        def graphsafe_get_state(self):
            return Generator(now.state)

        def clone_state(self):
            return Generator("clone of " + now.state)

        def graphsafe_set_state(self, other):
            now.state = other.name

    @contextlib.contextmanager
    def stream(new):
        before, now.stream = now.stream, new
        try:
            yield
        finally:
            now.stream = before

    class Graph:
        def __init__(self, graph, pool, capture_error_mode):
            self.pool, now.mode = pool, capture_error_mode

        def __enter__(self):
            now.pool, now.stream, now.state = self.pool, "capture", now.state + ", capturing"
            now.users += 1

        def __exit__(self, *exception):
            if exception[0] is not None:
                raise RuntimeError("operation failed due to a previous error during capture")
            now.pool, now.stream = None, "main"

    def end(index, pool):
        if now.pool != pool:
            raise RuntimeError("not currently recording to this pool")
        now.pool = None

    def release(index, pool):
        now.users -= 1

    for name, value in {
        "default_generators": {0: Generator()},
        "graph_pool_handle": lambda: object(),
        "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: None),
        "graph": Graph,
        "stream": stream,
        "current_stream": lambda: now.stream,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
    return now


def test_a_failed_capture_gives_back_allocator_stream_and_generator(cuda):
    captures = CudaCaptures(torch.device("cuda", 0))

    def step():
        raise ValueError("the step's own words")

    with pytest.raises(ValueError, match="the step's own words"):
        captures.capture(step)
    assert (cuda.pool, cuda.users, cuda.stream, cuda.state) == (None, 0, "main", "clean")
    _, chosen = captures.capture(lambda: torch.ones(1))
    assert chosen == 1 and (cuda.users, cuda.stream, cuda.state) == (1, "main", "clean")
    assert cuda.mode == "thread_local"
