"""What the benchmarks for GPUs measure is what they say: other vectors for every plan and layer, fresh rows for ops
that work in place, plans in the order that is named, and a failure is a row like any other."""

import os
import sys
import time

import pytest
import records
import torch
from benchmark_programs import load, processes_with, wait_for
from processes import Command, Ended

from faststeer.compile import compile_plan
from faststeer.intervention import Add


@pytest.fixture(scope="module")
def kernels():
    return load("kernels/gpu.py")


@pytest.fixture(scope="module")
def generation():
    return load("generation/gpu.py")


@pytest.fixture
def session(kernels, tmp_path):
    return kernels.Session(records.GpuTable(tmp_path / "a.csv", "dry run", "kernels"), time.monotonic() + 600, 1e9)


def rows_in(session) -> list[dict[str, str]]:
    return records.read(session.table._append.path)


class TestKernels:
    @pytest.mark.parametrize("op", ["steer", "steer_pair_", "add_steer_rmsnorm"])
    def test_rows_are_fresh_before_each_replay(self, kernels, session, monkeypatch, op):
        monkeypatch.setattr(kernels, "REPLAYS", 3)
        buffers = kernels.Buffers(4, 64)
        fresh, seen = (buffers.x[0].clone(), buffers.residual[0].clone()), []

        def run(case) -> None:
            seen.append((case.x.clone(), case.residual.clone()))
            if op == "steer_pair_":
                case.x.zero_()
                case.residual.zero_()

        session.record(op, "cpu", run, buffers, buffers.cases("add", 1), {})
        assert len(seen) == 4  # one warms up
        for tensors in seen[1:]:
            assert all(torch.equal(a, b) for a, b in zip(tensors, fresh, strict=True))

    def test_warm_x_is_written_just_before(self, kernels, session):
        buffers = kernels.Buffers(4, 64)
        fresh, seen = buffers.x[0].clone(), []

        def run(case) -> None:
            seen.append(case.x.clone())
            case.x.zero_()

        session.record("add_steer_rmsnorm", "cpu", run, buffers, buffers.cases("add", 1), {}, warm=True)
        assert len(seen) == 2 and all(torch.equal(x, fresh) for x in seen)
        assert rows_in(session)[0]["x"] == "warm"

    def test_a_failure_is_a_row_and_the_next_is_measured(self, kernels, session):
        buffers = kernels.Buffers(4, 64)
        cases = buffers.cases("add", 1)
        session.record("steer", "cpu", lambda c: 1 / 0, buffers, cases, {"steering": "add"})
        session.record("steer", "cpu", kernels.ours("steer", "reference"), buffers, cases, {"steering": "add"})
        broken, good = rows_in(session)
        assert broken["failed"] == "ZeroDivisionError: division by zero" and "us" not in broken
        assert "us" in good and session.table.failures == 1

    def test_too_little_memory_is_a_row(self, kernels, session, monkeypatch):
        def refuse(rows, hidden):
            raise MemoryError("16384 rows need 9.0 GiB, 1.0 GiB are free")

        monkeypatch.setattr(kernels, "Buffers", refuse)
        assert session.buffers(16384, 4096) is None
        assert rows_in(session)[0]["failed"] == "MemoryError: 16384 rows need 9.0 GiB, 1.0 GiB are free"

    @pytest.mark.parametrize(("rows", "plans"), [(12, 4), (16, 5), (7, 7), (9, 1)])
    def test_orders_of_plans(self, kernels, rows, plans):
        in_turn, together = (kernels.rows_of(rows, plans, "cpu", contiguous)[0] for contiguous in (False, True))
        assert in_turn.tolist() == [row % plans for row in range(rows)]
        assert together.tolist() == sorted(together.tolist())
        assert set(together.tolist()) == set(range(plans))
        counts = torch.bincount(together)
        assert counts.max() - counts.min() <= 1

    def test_every_call_has_tables_of_its_own(self, kernels, monkeypatch):
        buffers = kernels.Buffers(4, 64)
        buffers.sets = 3
        for name in ("x", "residual", "weight"):
            setattr(buffers, name, torch.cat([getattr(buffers, name)] * 3))
        buffers._fresh = [buffers.x.clone(), buffers.residual.clone()]
        cases = buffers.cases("mixed4", 2)
        tensors = [(c.x, c.residual, c.weight, *c.tables[:3], c.rows) for c in cases]
        addresses = [tensor.data_ptr() for case in tensors for tensor in case]
        assert len(set(addresses)) == len(addresses) == 3 * 7

    def test_launch_variables_reach_each_process(self, kernels, tmp_path, monkeypatch):
        calls = []

        class Done:
            returncode = 0

        def run(command, env, check):
            calls.append([env[name] for name in kernels.VARIABLES])
            return Done()

        monkeypatch.setattr(kernels.subprocess, "run", run)
        options = type("Options", (), {"csv": tmp_path / "a.csv", "stage": "sweep"})
        assert kernels.measure_sweep(options, time.monotonic() + 60) == 0
        assert calls == [["8", "8"], ["16", "16"], ["32", "32"]]


class TestGeneration:
    @pytest.mark.parametrize("option", ["llama-8b", "qwen-1.5b"])
    def test_every_plan_has_a_vector_of_its_own_at_every_layer(self, generation, option):
        _, config = generation.config_of(option)
        plans = generation.plans(config, 5)["a vector per plan and layer"]
        vectors = []
        for plan in plans:
            (intervention,) = plan
            assert isinstance(intervention, Add)
            entries = compile_plan(plan, config.num_hidden_layers, config.hidden_size)
            assert sorted({entry.site for entry in entries}) == sorted(entry.site for entry in entries)
            vectors += [entry.basis.flatten() for entry in entries]
        assert len(vectors) == 5 * config.num_hidden_layers
        assert len({tuple(vector.tolist()) for vector in vectors}) == len(vectors)

    def test_a_model_that_does_not_fit_is_a_row(self, generation, tmp_path, monkeypatch):
        def refuse(config):
            raise MemoryError("the weights have 15.0 GiB, 4.0 GiB are free")

        monkeypatch.setattr(generation, "build", refuse)
        table = records.GpuTable(tmp_path / "a.csv", "dry run", "Engine")
        options = type("Options", (), {"model": "llama-8b", "who": ["engine"], "rows": [1], "steerings": ["unsteered"]})
        generation.measure_model(table, options, time.monotonic() + 60)
        assert (
            records.read(table._append.path)[-1]["failed"] == "MemoryError: the weights have 15.0 GiB, 4.0 GiB are free"
        )

    def test_a_case_that_fails_does_not_end_the_others(self, generation, tmp_path, monkeypatch):
        def cases(model, who, rows, steerings):
            yield "unsteered", lambda n: 1 / 0
            yield "every layer", lambda n: None

        monkeypatch.setattr(generation, "cases", cases)
        table = records.GpuTable(tmp_path / "a.csv", "dry run", "Engine")
        options = type("Options", (), {"model": "llama-8b", "who": ["engine"], "rows": [1], "steerings": ["unsteered"]})
        generation.measure_model(table, options, time.monotonic() + 60)
        broken, good = records.read(table._append.path)[-2:]
        assert "failed" in broken and "step_ms" in good and good["percent_of_weights"]


# vLLM as its benchmark meets it: an engine with a process in another session, which measures two cases and then hangs.
ENGINE = """
import subprocess, sys, time
class SamplingParams:
    def __init__(self, **options): self.max_tokens = options["max_tokens"]
class LLM:
    def __init__(self, **options):
        subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
        self.calls = 0
    def generate(self, prompts, parameters, use_tqdm):
        self.calls += 1
        if self.calls > 8:  # the third case
            open("third case", "w").close()
            time.sleep(600)
        class Answer: pass
        answers = []
        for one in parameters:
            answer = Answer(); answer.outputs = [Answer()]; answer.outputs[0].token_ids = [0] * one.max_tokens
            answers.append(answer)
        return answers
"""


def test_an_engine_that_hangs_leaves_its_rows_and_no_process(tmp_path, marker, monkeypatch):
    vllm = load("vllm/gpu.py")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "vllm.py").write_text(ENGINE)
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text('{"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2}')
    append = records.Appended(tmp_path / "vllm.csv", vllm.COLUMNS)
    options = type("Options", (), {"attention": "FLASH_ATTN", "out": tmp_path})
    monkeypatch.setenv("MARKER", marker)
    monkeypatch.setattr(vllm, "ENGINES", (("off", ("a", "b", "c")),))
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    program = tmp_path / "engine.py"  # the program with other cases
    program.write_text(
        f"import sys; sys.path.insert(0, {str(os.path.dirname(vllm.__file__))!r})\n"
        f"import importlib.util as u; spec = u.spec_from_file_location('vllm_gpu', {vllm.__file__!r})\n"
        "gpu = sys.modules['vllm_gpu'] = u.module_from_spec(spec); spec.loader.exec_module(gpu)\n"
        "gpu.ENGINES = (('off', ('a', 'b', 'c')),); gpu.payloads = lambda *_: [None] * 4; sys.exit(gpu.main())\n"
    )
    monkeypatch.setattr(vllm, "__file__", str(program))
    monkeypatch.chdir(tmp_path)

    class UntilItHangs(Command):
        """Its time is over as soon as it hangs."""

        def wait(self) -> Ended:
            wait_for(lambda: (tmp_path / "third case").exists(), 120)
            self.stop()
            return Ended(None, 9.0)

    monkeypatch.setattr(vllm, "Command", UntilItHangs)
    wrong = vllm.run_engine("off", model, options, path, 600, append, {"run": "dry run", "model": "tiny"})
    assert wrong.startswith("stopped after")
    assert [row["case"] for row in records.read(tmp_path / "vllm.csv")] == ["a", "b"]
    assert processes_with(marker) == []


def test_liger_takes_what_the_benchmark_gives(kernels):
    """Where it is installed: the function's arguments are those that are passed."""
    pytest.importorskip("liger_kernel")
    import inspect

    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    names = list(inspect.signature(inspect.unwrap(LigerFusedAddRMSNormFunction.forward)).parameters)
    assert names == ["ctx", "X", "R", "W", "eps", "offset", "casting_mode", "in_place"]


def test_counters_become_rows():
    sys.modules.pop("counters", None)
    counters = load("gpu/counters.py")
    text = (
        "==PROF== Profiling\n4 kernels ran\n"
        '"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"\n'
        '"","","ns","register/thread"\n"0","row_kernel","1,234,000","128"\n"1","residual_kernel","2500","155"\n'
    )
    first, second = counters.rows_of(text)
    assert first["us"] == "1234.0" and first["op"] == "row_kernel: 128 registers"
    assert second["us"] == "2.5" and second["what"] == "counters"
    assert counters.rows_of("==ERROR== ERR_NVGPUCTRPERM") == []
