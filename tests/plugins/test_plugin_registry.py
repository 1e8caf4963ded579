"""Discovery, bridge and listing: good plugins come through, every kind of bad one is named and harms nobody."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

from vmf.device.base import DeviceEnvironment
from vmf.errors import BackendUnavailable, PluginError, ShortageError
from vmf.machine.bus import Bus
from vmf.machine.clock import MachineClock
from vmf.machine.timers import TimerQueue
from vmf.plugins import GROUPS, discovery, hookspecs, list_plugins
from vmf.plugins.bridge import DRIVER_HOOKS, PluginRegistry

HEAD = """
from vmf.plugins import hookimpl
vmf_api_version = 1
"""

TRANSPORT = (
    HEAD
    + """
from vmf.transport.base import Transport

class T(Transport):
    scheme = "{scheme}"
    def listen(self, address): raise NotImplementedError
    def connect(self, address, timeout): raise NotImplementedError

@hookimpl
def vmf_transport():
    return T()
"""
)

BACKEND = (
    HEAD
    + """
from vmf.cpu.backend import Availability, CpuBackend
from vmf.cpuid.table import CpuidTable

class B(CpuBackend):
    name = "{name}"
    preference = {preference}
    def availability(self): return Availability({usable}, "no engine", "Build one.", "9.9")
    def cpuid_capability(self): return CpuidTable()
    def tsc_khz(self): return 1000000
    def create_vcpu(self, environment): raise NotImplementedError

@hookimpl
def vmf_cpu_backend():
    return B()
"""
)


@pytest.fixture
def environment() -> DeviceEnvironment:
    made = {field.name: SimpleNamespace() for field in attrs.fields(DeviceEnvironment)}
    made |= {"options": {}, "bus": Bus(), "timers": TimerQueue(MachineClock())}  # type: ignore[dict-item]
    return DeviceEnvironment(**made)  # type: ignore[arg-type]


def test_good_transport_is_loaded_once_and_only_when_used(make_plugin: Any) -> None:
    make_plugin("transport", "pigeon", TRANSPORT.format(scheme="pigeon"), distribution="birds", version="2.1")
    registry = PluginRegistry()
    entry = discovery.find("transport", "pigeon")
    assert (entry.distribution, entry.version) == ("birds", "2.1")
    assert entry.target not in sys.modules, "finding must not import"
    assert registry.transport("pigeon") is registry.transport("pigeon")
    assert entry.target in sys.modules


def test_unknown_name_lists_what_is_there(make_plugin: Any) -> None:
    make_plugin("transport", "pigeon", TRANSPORT.format(scheme="pigeon"))
    with pytest.raises(PluginError, match=r"no transport plugin 'pidgeon'.*pigeon"):
        PluginRegistry().transport("pidgeon")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("assert False, 'not today'", "not today"),
        (TRANSPORT.format(scheme="bad").replace("vmf_api_version = 1", ""), "vmf_api_version"),
        (TRANSPORT.format(scheme="bad").replace("vmf_api_version = 1", "vmf_api_version = 99"), "version 99"),
        (HEAD, "does not implement the hook vmf_transport"),
        (HEAD + "@hookimpl\ndef vmf_transprot(): pass\n", "unknown hook"),
        (HEAD + "@hookimpl\ndef vmf_transport(color): pass\n", "color"),
        (HEAD + "@hookimpl\ndef vmf_transport(): return 7\n", "returned 7 (int)"),
        (HEAD + "@hookimpl\ndef vmf_transport(): return 1 / 0\n", "ZeroDivisionError"),
        (HEAD + "@hookimpl\ndef vmf_transport(): raise SystemExit\n", "SystemExit"),
        (TRANSPORT.format(scheme="other"), "calls itself scheme='other'"),
        (
            TRANSPORT.format(scheme="bad") + "\n@hookimpl\ndef vmf_teleport_phase(name, role, phase): pass\n",
            "vmf_teleport_phase, which is never called in the group vmf.transport",
        ),
    ],
)
def test_broken_transport_is_named_and_others_go_on(make_plugin: Any, code: str, said: str) -> None:
    make_plugin("transport", "bad", code, distribution="culprit")
    make_plugin("transport", "good", TRANSPORT.format(scheme="good"))
    registry = PluginRegistry()
    with pytest.raises(PluginError) as caught:
        registry.transport("bad")
    assert said.lower() in caught.value.message.lower()
    assert "'bad'" in caught.value.message
    assert "culprit" in caught.value.message
    assert caught.value.remedy
    assert registry.transport("good").scheme == "good"


def test_an_import_that_does_not_end_is_given_up(make_plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "LOAD_SECONDS", 0.3)
    make_plugin("device", "hangs", "import time; time.sleep(20)", distribution="culprit")
    began = time.monotonic()
    with pytest.raises(PluginError, match=r"'hangs' \(of culprit 1\.0\) cannot be imported: .* within 0\.3 s"):
        PluginRegistry().load("device", "hangs")
    assert time.monotonic() - began < 15


def test_an_import_that_lacks_memory_or_descriptors_is_not_the_plugins_fault(make_plugin: Any) -> None:
    make_plugin("device", "one", "raise MemoryError")
    make_plugin("device", "two", "raise OSError(24, 'Too many open files')")
    for name, remedy in (("one", "ulimit -v"), ("two", "ulimit -n")):
        with pytest.raises(ShortageError) as caught:
            PluginRegistry().load("device", name)
        assert remedy in caught.value.remedy


def test_duplicates_are_both_named_and_neither_is_imported(make_plugin: Any) -> None:
    make_plugin("transport", "twin", TRANSPORT.format(scheme="twin"), distribution="castor")
    make_plugin("transport", "twin", TRANSPORT.format(scheme="twin"), distribution="pollux")
    with pytest.raises(PluginError, match=r"castor 1\.0 and pollux 1\.0"):
        PluginRegistry().transport("twin")
    assert not [name for name in sys.modules if name.startswith("made_for_test_")]


def test_backends_come_by_preference_and_auto_takes_the_first_usable(make_plugin: Any) -> None:
    for name, preference, usable in (("slow", 900, True), ("fast", 999, False), ("mid", 950, True)):
        make_plugin("cpu", name, BACKEND.format(name=name, preference=preference, usable=usable))
    make_plugin("cpu", "broken", "1/0", distribution="culprit")
    registry = PluginRegistry(on_problem=lambda problem: None)
    assert [backend.name for backend in registry.cpu_backends()][:3] == ["fast", "mid", "slow"]
    assert registry.choose_cpu_backend("auto").name == "mid"
    assert registry.choose_cpu_backend("auto", lambda b: "too fast" if b.name == "mid" else "").name == "slow"
    assert len(registry.problems) == 1
    assert "culprit" in registry.problems[0].message
    with pytest.raises(BackendUnavailable, match=r"'fast' cannot work here: no engine\. Build one\."):
        registry.choose_cpu_backend("fast")
    with pytest.raises(BackendUnavailable, match=r"fast: no engine.*mid: never.*culprit"):
        registry.choose_cpu_backend("auto", lambda backend: "never")


@pytest.mark.parametrize("does", ["raise OSError('no')", "raise SystemExit", "return None", "return {1}", "return -1"])
def test_auto_passes_over_a_backend_that_cannot_tell_whether_it_works(make_plugin: Any, does: str) -> None:
    broken = BACKEND.format(name="odd", preference=999, usable=True).replace(
        "return Availability", f"{does}; Availability"
    )
    make_plugin("cpu", "odd", broken, distribution="culprit")
    make_plugin("cpu", "fine", BACKEND.format(name="fine", preference=998, usable=True))
    registry = PluginRegistry(on_problem=lambda problem: None)
    chosen, refusals = registry.rank_cpu_backends()
    assert chosen is not None
    assert chosen.name == "fine"
    assert [refusal.backend for refusal in refusals] == ["odd"]
    assert "cpu plugin 'odd' (of culprit 1.0)" in refusals[0].reason
    with pytest.raises(PluginError, match=r"cpu plugin 'odd' \(of culprit 1\.0\)"):
        registry.choose_cpu_backend("odd")


DEVICE = (
    HEAD
    + """
from vmf.device.base import Device, Payload
closed = []
class D(Device):
    kind = "test.d"
    def __init__(self, options): self.options = options
    def reset(self): pass
    def save(self): return Payload(self.kind, 1)
    def restore(self, payload): pass
    def close(self): closed.append(self)

@hookimpl
def vmf_create_device(environment):
    return [D(environment.options), D(environment.options)]
"""
)


def test_devices_get_their_own_options_in_order(make_plugin: Any, environment: DeviceEnvironment) -> None:
    make_plugin("device", "one", DEVICE)
    made = PluginRegistry().devices(environment, ["one"], {"one": {"colour": "red"}, "two": {}})
    assert [device.options for device in made] == [{"colour": "red"}] * 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (DEVICE.replace("return [D", "return 'abc' or [D"), "returned str"),
        (DEVICE.replace("return [D", "return None or 5 or [D"), "returned .*int"),
        (HEAD + "@hookimpl\ndef vmf_create_device(environment): return None\n", "returned None"),
        (DEVICE.replace("return [D(environment.options), ", "return [object(), "), "returned object"),
        (DEVICE.replace("return [D", "raise OSError('gone') or [D"), "OSError: gone"),
    ],
)
def test_wrong_devices_are_refused_and_earlier_ones_closed(
    make_plugin: Any, environment: DeviceEnvironment, code: str, said: str
) -> None:
    make_plugin("device", "first", DEVICE)
    make_plugin("device", "second", code, distribution="culprit")
    registry = PluginRegistry()
    with pytest.raises(PluginError, match=said) as caught:
        registry.devices(environment, ["first", "second"])
    assert "culprit" in caught.value.message
    first = sys.modules[discovery.find("device", "first").target]
    assert len(first.closed) == 2


OBSERVER = (
    HEAD
    + """
seen = []
@hookimpl
def vmf_machine_state_changed(name, old, new):
    seen.append((name, old, new))
    {then}
"""
)


@pytest.mark.parametrize("then", ["raise ValueError('boom')", "raise SystemExit(1)"])
def test_raising_observer_is_set_aside_and_others_go_on(make_plugin: Any, then: str) -> None:
    make_plugin("hooks", "a-bad", OBSERVER.format(then=then), distribution="culprit")
    make_plugin("hooks", "b-good", OBSERVER.format(then="pass"))
    make_plugin("hooks", "c-broken", "import no_such_module_anywhere", distribution="rubble")
    make_plugin("hooks", "d-empty", HEAD, distribution="void")
    registry = PluginRegistry(on_problem=lambda problem: None)
    for new in ("starting", "running"):
        registry.hooks.machine_state_changed("vm", "poweredoff", new)
    bad, good = (sys.modules[discovery.find("hooks", name).target] for name in ("a-bad", "b-good"))
    assert len(bad.seen) == 1
    assert len(good.seen) == 2
    assert [word for word in ("rubble", "void", "culprit") if any(word in p.message for p in registry.problems)] == [
        "rubble",
        "void",
        "culprit",
    ]
    assert "not called any more" in registry.problems[-1].message


def test_failing_check_is_a_blocker_and_failing_policy_an_error(make_plugin: Any) -> None:
    from vmf.cpuid.table import CpuidTable

    make_plugin(
        "hooks",
        "good",
        HEAD
        + """
from vmf.teleport.check import Blocker
@hookimpl
def vmf_preflight_check(name, role, description):
    return [Blocker("backup", "running", "idle", "Wait.")]
@hookimpl
def vmf_cpuid_policy(name, contract):
    return contract
""",
    )
    make_plugin(
        "hooks",
        "raising",
        HEAD + "@hookimpl\ndef vmf_preflight_check(name, role, description): raise KeyError('x')\n"
        "@hookimpl\ndef vmf_cpuid_policy(name, contract): return None\n",
    )
    make_plugin("hooks", "nonsense", HEAD + "@hookimpl\ndef vmf_preflight_check(name, role, description): return [4]\n")
    make_plugin("hooks", "number", HEAD + "@hookimpl\ndef vmf_preflight_check(name, role, description): return 4\n")
    hooks = PluginRegistry().hooks
    fields = [blocker.field for blocker in hooks.preflight_check("vm", "source", {})]
    assert sorted(fields) == [
        "backup",
        "preflight check 'nonsense'",
        "preflight check 'number'",
        "preflight check 'raising'",
    ]
    assert hooks.cpuid_policy("vm", CpuidTable()) == [CpuidTable()]
    make_plugin("hooks", "policy", HEAD + "@hookimpl\ndef vmf_cpuid_policy(name, contract): return 1/0\n")
    with pytest.raises(PluginError, match=r"'policy'.*ZeroDivisionError"):
        PluginRegistry().hooks.cpuid_policy("vm", CpuidTable())


def test_every_hook_belongs_to_a_kind_and_has_an_example() -> None:
    hooks = [name for name in dir(hookspecs) if name.startswith("vmf_")]
    assert set(DRIVER_HOOKS) | {"hooks"} == set(GROUPS)
    for name in hooks:
        text = getattr(hookspecs, name).__doc__
        kind = {hook: kind for kind, hook in DRIVER_HOOKS.items()}.get(name, "hooks")
        assert f"Group `{GROUPS[kind]}`" in text, name
        assert f"def {name}(" in text, name


def test_all_sorts_of_plugins_are_told_apart(make_plugin: Any, tmp_path: Path) -> None:
    orphan = tmp_path / "orphan"
    make_plugin("transport", "good", TRANSPORT.format(scheme="good"), version="3.2")
    make_plugin("cpu", "usable", BACKEND.format(name="usable", preference=1, usable=True))
    make_plugin("cpu", "unusable", BACKEND.format(name="unusable", preference=1, usable=False))
    make_plugin("transport", "broken", "import no_such_module_anywhere")
    make_plugin("transport", "noisy", "print('{}' * 100000)\n" + TRANSPORT.format(scheme="noisy"))
    make_plugin("transport", "crashing", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    make_plugin("transport", "leaving", "import os; os._exit(0)")
    make_plugin(
        "transport",
        "hanging",
        f"""
        import subprocess, time
        child = subprocess.Popen(["sleep", "1000"])
        open({str(orphan)!r}, "w").write(str(child.pid))
        time.sleep(1000)
        """,
    )
    make_plugin("device", "twin", HEAD, distribution="castor")
    make_plugin("device", "twin", HEAD, distribution="pollux")
    began = time.monotonic()
    records = {(record.kind, record.name, record.distribution): record for record in list_plugins(probe_seconds=8)}
    assert time.monotonic() - began < 60
    by_name = {record.name: record for record in records.values()}

    assert by_name["good"].usable
    assert by_name["good"].version == "3.2"
    assert by_name["noisy"].usable, by_name["noisy"]
    assert by_name["usable"].usable
    assert by_name["usable"].detail == "9.9"
    expected = {
        "unusable": "no engine",
        "broken": "no_such_module_anywhere",
        "crashing": "SIGSEGV",
        "leaving": "exit status 0",
        "hanging": "within 8 seconds",
        "twin": "castor 1.0 and pollux 1.0",
    }
    for name, reason in expected.items():
        assert not by_name[name].usable, name
        assert reason in by_name[name].reason, by_name[name]
        assert by_name[name].remedy, name
    assert len([record for record in records.values() if record.name == "twin"]) == 2
    assert not [name for name in sys.modules if name.startswith("made_for_test_")], "imported here"

    pid = int(orphan.read_text())
    deadline = time.monotonic() + 60
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid), "what a hanging plugin started must die with it"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
