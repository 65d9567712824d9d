"""What is registered, what lies in the folder, and that nothing outside the folder is ever opened."""

from __future__ import annotations

import os
import threading

import pytest
from strategies import randn

import faststeer as fs
from faststeer.vllm.registry import Registry, read_vector


def vector(seed: int = 0) -> fs.SteeringVector:
    return fs.SteeringVector({0: randn(seed, 8)})


class TestNames:
    def test_registered_replaced_removed(self):
        registry = Registry()
        registry.register_vector("v", vector(0))
        registry.register_vector("v", vector(1))
        assert registry.vector("v")[0][0].equal(vector(1)[0]) and registry.vectors() == ["v"]
        plan = fs.Plan([fs.Add(registry.vector("v")[0])])
        registry.register_plan("p", plan)
        registry.remove_vector("v")
        assert registry.plan("p") == (plan, None)  # by value: it needs the vector no more
        registry.remove_plan("p")
        assert registry.vectors() == registry.plans() == []
        for remove in (registry.remove_vector, registry.remove_plan):
            with pytest.raises(ValueError, match="registered as 'v'; registered: none"):
                remove("v")

    @pytest.mark.parametrize("name", ["", "none", "../x", "a/b", ".x", "{", "a b", "x" * 129, "é", 3, None, "a\n"])
    def test_that_are_none(self, name):
        registry = Registry()
        with pytest.raises(ValueError, match="is no name: expected a letter or digit"):
            registry.register_vector(name, vector())
        with pytest.raises(ValueError, match="is no name"):
            registry.register_plan(name, fs.Plan())
        assert registry.vectors() == registry.plans() == []

    def test_other_things_are_refused(self):
        with pytest.raises(ValueError, match="expected a SteeringVector, got Plan"):
            Registry().register_vector("v", fs.Plan())
        with pytest.raises(ValueError, match="expected a Plan, got str"):
            Registry().register_plan("p", "{}")

    def test_no_more_bytes_than_allowed(self):
        registry = Registry(max_bytes=70)
        registry.register_vector("a", vector())
        registry.register_vector("a", vector(1))  # in its own place
        registry.register_vector("b", vector())
        with pytest.raises(ValueError, match="96 bytes of registered vectors and plans, more than the 70"):
            registry.register_vector("c", vector())
        registry.remove_vector("a")
        registry.register_vector("c", vector())
        assert registry.vectors() == ["b", "c"]

    def test_from_many_threads(self):
        registry = Registry()

        def work(number: int) -> None:
            for _ in range(50):
                registry.register_vector(f"v{number}", vector())
                registry.vectors()
                registry.remove_vector(f"v{number}")

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert registry.vectors() == [] and registry.version == 400


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "served" / "inner").mkdir(parents=True)
        vector(1).save(tmp_path / "served" / "inner" / "one.safetensors")
        vector(2).save(tmp_path / "outside.safetensors")
        return tmp_path / "served"

    def test_files_by_path_and_name(self, folder):
        vector(3).save(folder / "two.safetensors")
        (folder / "calm.json").write_text('{"add": "two"}')
        (folder / "not a name.json").write_text("{}")
        registry = Registry(folder)
        assert registry.vector_file("inner/one.safetensors")[0][0].equal(vector(1)[0])
        assert registry.vector_file("inner/../two.safetensors")[0][0].equal(vector(3)[0])
        assert registry.vector("two")[0][0].equal(vector(3)[0])
        assert registry.plan("calm")[0] == '{"add": "two"}'
        assert registry.vectors() == ["two"] and registry.plans() == ["calm"]
        registry.register_vector("two", vector(4))  # what is registered comes first
        assert registry.vector("two")[0][0].equal(vector(4)[0])

    def test_is_read_again_when_it_changes(self, folder):
        registry, path = Registry(folder), folder / "v.safetensors"
        vector(3).save(path)
        before, stamp = registry.vector("v")
        assert registry.vector("v")[0] is before and stamp.holds()
        vector(4).save(path)
        os.utime(path, ns=(1, 1))
        assert not stamp.holds() and registry.vector("v")[0][0].equal(vector(4)[0])
        path.unlink()
        assert not stamp.holds()
        with pytest.raises(ValueError, match="no vector is registered as 'v'"):
            registry.vector("v")

    def test_a_file_of_the_same_size_and_time_in_its_place(self, folder):
        registry, path, other = Registry(folder), folder / "v.safetensors", folder / "other.safetensors"
        vector(3).save(path)
        vector(4).save(other)
        _, stamp = registry.vector("v")
        status = path.stat()
        assert other.stat().st_size == status.st_size
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.replace(path)
        assert path.stat().st_mtime_ns == status.st_mtime_ns
        assert not stamp.holds() and registry.vector("v")[0][0].equal(vector(4)[0])

    @pytest.mark.parametrize(
        "path",
        [
            "../outside.safetensors",
            "inner/../../outside.safetensors",
            "link.safetensors",
            "linked/outside.safetensors",
            "/etc/passwd",
            "..",
        ],
    )
    def test_nothing_outside(self, folder, path):
        (folder / "link.safetensors").symlink_to(folder.parent / "outside.safetensors")
        (folder / "linked").symlink_to(folder.parent)
        with pytest.raises(ValueError, match="leads out of the server's folder"):
            Registry(folder).vector_file(path)

    def test_nor_by_a_link_with_a_name(self, folder):
        (folder / "link.safetensors").symlink_to(folder.parent / "outside.safetensors")
        with pytest.raises(ValueError, match="leads out"):
            Registry(folder).vector("link")

    def test_a_link_that_stays_inside(self, folder):
        (folder / "link.safetensors").symlink_to(folder / "inner" / "one.safetensors")
        assert Registry(folder).vector("link")[0][0].equal(vector(1)[0])

    @pytest.mark.parametrize(
        ("path", "says"),
        [
            ("none.safetensors", "No such file"),
            ("inner", "cannot be read: Is a directory"),
            ("pipe", "is no plain file"),
            ("circle", "is no path of a file|levels of symbolic links"),
            ("a\0b", "is no path of a file"),
            ("x" * 5000, "cannot be read|is no path"),
            ("large.safetensors", "larger than the 1,000 bytes"),
            ("text.safetensors", "'text.safetensors': its content is no safetensors file, and a server reads"),
        ],
        ids=lambda value: value[:12],
    )
    def test_what_cannot_be_read(self, folder, path, says):
        os.mkfifo(folder / "pipe")
        (folder / "circle").symlink_to(folder / "circle")
        (folder / "large.safetensors").write_bytes(bytes(1001))
        (folder / "text.safetensors").write_text("hello, this is no vector")
        before = os.listdir("/proc/self/fd")
        with pytest.raises(ValueError, match=says):
            Registry(folder, max_file_bytes=1000).vector_file(path)
        assert len(os.listdir("/proc/self/fd")) == len(before)  # nothing stays open

    def test_a_plan_that_is_no_text(self, folder):
        (folder / "p.json").write_bytes(b"\xe9\xff")
        with pytest.raises(ValueError, match=r"'p.json': it is no UTF-8 text"):
            Registry(folder).plan("p")

    def test_no_folder_no_files(self, tmp_path):
        with pytest.raises(ValueError, match="this server reads no files"):
            Registry().vector_file("x.safetensors")
        with pytest.raises(ValueError, match="there is no folder"):
            Registry(tmp_path / "none")

    def test_a_sparse_vector(self, folder):
        sparse = fs.algebra.sparsify(fs.SteeringVector({0: randn(0, 64)}), keep=0.2)
        sparse.save(folder / "sparse.safetensors")
        assert Registry(folder).vector("sparse")[0][0].equal(sparse.dense()[0])
        assert read_vector(sparse.to_bytes())[0].equal(sparse.dense()[0])
