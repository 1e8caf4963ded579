"""What a machine's guest is going to see of its CPU: decided once, before its first instruction.

    decision = settle(config, registry, plug)

The capability of the machine's own backend is the beginning. When the definition names teleport peers, the machines
that wait there are asked for theirs (all at the same time), and the contract is made from what all can present; with
the level "auto" at their common level. Installed policies may restrict it further.

Which backend that is belongs to the same decision: with `--cpu-backend auto` the most preferred one that works here and
can honour what the definition asks for (features that are set, the vendor, the peers' TSC rate) takes the machine, and
when it fails to present the contract as it was told to, the next one does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from vmf.cpuid.contract import make_contract
from vmf.cpuid.features import CpuidError, features_of
from vmf.cpuid.levels import LEVELS, Level, level_of, parse_level
from vmf.cpuid.negotiate import Capability, negotiate
from vmf.cpuid.render import table_json
from vmf.errors import AuthenticationError, ContractOverridden, MachineError, PluginError, StateError, VmfError
from vmf.machine.config import AUTO_LEVEL, MachineConfig, split_peer
from vmf.transport.base import Address

if TYPE_CHECKING:
    from vmf.cpu.backend import CpuBackend
    from vmf.cpuid.table import CpuidTable
    from vmf.plugins.bridge import BackendRefusal, PluginRegistry
    from vmf.teleport.ask import HostCapability

CONNECT_TIMEOUT_S = 10.0
AUTO_BACKEND = "auto"


@frozen
class ContractOrigin:
    """How the contract in force came about, for people and programs.

    Attributes:
        level: "0" to "4", or a profile's name: at which it was made.
        requested: what the definition asked for; "auto" was negotiated. "" where the machine came by a teleport.
        peers: who else was asked.
        explanation: sentences.
    """

    level: str
    requested: str = ""
    peers: tuple[str, ...] = ()
    explanation: tuple[str, ...] = ()

    @property
    def number(self) -> int:
        """The level, profiles counting as 0: from where on a higher level helps."""
        return int(self.level) if self.level.isdecimal() else 0

    @property
    def label(self) -> str:
        """For people: "3 (x86-64-v2)"."""
        known = parse_level(self.level)
        return f"{known.number} ({known.name})" if isinstance(known, Level) else known.name


@frozen
class Decision:
    """The contract, the rate of the guest's TSC in kHz, and why; for which backend, and, where that was chosen here,
    why that one ("" when the user chose)."""

    table: CpuidTable
    tsc_khz: int
    origin: ContractOrigin
    backend: CpuBackend
    choice: str = ""


def capability_of(backend: CpuBackend, where: str = "this host") -> Capability:
    """What a backend can present here, as a party of a negotiation."""
    native = backend.tsc_khz()
    # A backend without scaling takes rates within 250 ppm of its own only.
    scaling = backend.tsc_khz_supported(native // 2) and backend.tsc_khz_supported(native * 2)
    return Capability(backend.cpuid_capability(), native, scaling, f"{where} ({backend.name})")


def peer_label(host: str, port: int) -> str:
    """As the user wrote it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def ask_host(
    registry: PluginRegistry,
    host: str,
    port: int,
    *,
    asker: str = "",
    transport: str = "tcp",
    options: Mapping[str, Any] | None = None,
    password: str | None = None,
) -> HostCapability:
    """Ask the machine that waits for a teleport there what its CPU backend can present.

    Args:
        asker: who asks, for the log there.
        transport, options: name of the transport plugin, and its own settings.
        password: of the machine that waits there; None for none.

    Raises TransportError when nobody can be reached, TeleportError when there is no answer.
    """
    from vmf.teleport.ask import ask_capability

    channel = registry.transport(transport).connect(Address(transport, host, port, options or {}), CONNECT_TIMEOUT_S)
    try:
        return ask_capability(channel, asker, peer_label(host, port), password=password)
    finally:
        channel.close()


def decide(
    config: MachineConfig, backend: CpuBackend, registry: PluginRegistry, answers: Sequence[Capability] | None = None
) -> Decision:
    """The contract of a machine that is about to start on this backend.

    Args:
        answers: what the definition's peers can present, when they were asked before.

    Raises MachineError naming every peer that could not be asked, CpuidError when there is no contract that all can
    honour or the definition asks for what cannot be presented.
    """
    wishes = config.cpuid
    own = capability_of(backend)
    requested = wishes.portability_level
    level: int | str = requested
    explanation: list[str] = []
    table, khz = own.table, own.tsc_khz
    if wishes.peers:
        answers = ask_peers(config, registry) if answers is None else answers
        agreement = negotiate([own, *answers])
        explanation = [f"Asked {', '.join(answer.name for answer in answers)}.", *agreement.explain()]
        if not agreement.possible:
            agreement.contract()  # raises, saying why
        table = agreement.table
        if own.tsc_scaling and agreement.tsc_khz:
            khz = agreement.tsc_khz
        level = agreement.level if requested == AUTO_LEVEL else requested
    chosen = parse_level(level)
    contract = make_contract(table, level, wishes.set, wishes.remove, vendor=wishes.vendor or None, tsc_khz=khz)
    for restricted in registry.hooks.cpuid_policy(config.name, contract):
        before = features_of(contract)
        contract = negotiate([contract, restricted]).table
        if lost := before - features_of(contract):
            explanation.append(f"A policy removed {', '.join(sorted(item.name for item in lost))}.")
    name = str(chosen.number) if isinstance(chosen, Level) else chosen.name
    return Decision(contract, khz, ContractOrigin(name, requested, wishes.peers, tuple(explanation)), backend)


def settle(
    config: MachineConfig,
    registry: PluginRegistry,
    plug: Callable[[Decision], None],
    peer_password: str | None = None,
) -> Decision:
    """Decide about backend and contract, and make the vCPU with `plug`; returns the decision that held.

    With "auto" a backend that cannot honour what the definition asks for, or whose vCPU cannot be made for the contract
    (see `plug`), is passed over for the next one, and the decision says so.

    Args:
        plug: raises BackendUnavailable, StateError or ContractOverridden when the vCPU cannot be made so.

    Raises what `decide` and `plug` do when just one backend works here, and BackendUnavailable with the reasons of all
    when there are more.
    """
    answers = ask_peers(config, registry, peer_password) if config.cpuid.peers else None
    if config.cpu_backend != AUTO_BACKEND:
        decision = decide(config, registry.choose_cpu_backend(config.cpu_backend), registry, answers)
        plug(decision)
        return decision
    made: list[Decision] = []
    errors: list[VmfError] = []

    def accept(backend: CpuBackend) -> str:
        try:
            decision = decide(config, backend, registry, answers)
            plug(decision)
        except (CpuidError, PluginError, StateError, ContractOverridden) as error:
            errors.append(error)
            return f"{error.message} {error.remedy}".rstrip()
        made.append(decision)
        return ""

    chosen, refusals = registry.rank_cpu_backends(accept)
    if chosen is None and len(errors) == 1:
        raise errors[0]
    if chosen is None:
        raise registry.no_cpu_backend(refusals)
    return evolve(made[-1], choice=describe_choice(made[-1].backend, refusals))


def describe_choice(backend: CpuBackend, refusals: Sequence[BackendRefusal]) -> str:
    """What "auto" chose and why, for people: "unicorn chosen; kvm cannot be used here: ..."."""
    why = [str(refusal) for refusal in refusals] or [
        "the most preferred one here, and it honours the machine's contract"
    ]
    return "; ".join([f"{backend.name} chosen", *why])


def ask_peers(config: MachineConfig, registry: PluginRegistry, password: str | None = None) -> Sequence[Capability]:
    """What the definition's peers can present; `password` is that of all of them, None for none.

    Raises MachineError naming every one that could not be asked.
    """
    teleporter = config.teleporter
    # `allow` is about who may come here.
    options = {key: value for key, value in teleporter.transport_options().items() if key != "allow"}

    def ask(peer: str) -> Capability | VmfError:
        try:
            host, port = split_peer(peer)
            name, transport = config.name, teleporter.transport
            answer = ask_host(registry, host, port, asker=name, transport=transport, options=options, password=password)
            return answer.capability
        except AuthenticationError as error:
            if password is not None:
                return error
            return AuthenticationError(
                error.message, f"`vmf startvm {config.name} --peer-password-file FILE` gives the password of the peers."
            )
        except VmfError as error:
            return error

    peers = tuple(dict.fromkeys(config.cpuid.peers))
    with ThreadPoolExecutor(min(8, len(peers)), "vmf-ask-peer") as pool:
        answers = list(pool.map(ask, peers))
    pairs = zip(peers, answers, strict=True)
    refused = [f"{peer}: {answer}" for peer, answer in pairs if isinstance(answer, VmfError)]
    if refused:
        raise MachineError(
            f"machine {config.name} was not started, as its CPUID contract is negotiated with its teleport peers and"
            f" {'this one' if len(refused) == 1 else 'these'} could not be asked: {' '.join(refused)}",
            "Let a machine wait for a teleport there (`vmf startvm` with the teleporter on), or start without asking"
            f" anybody: `vmf modifyvm {config.name} --teleport-peer none --cpuid-portability-level 3`, say.",
        )
    return [answer for answer in answers if isinstance(answer, Capability)]


def describe_contract(table: CpuidTable, origin: ContractOrigin) -> dict[str, Any]:
    """The contract in force as plain data."""
    return {
        "level": origin.level,
        "label": origin.label,
        "requested": origin.requested,
        "peers": list(origin.peers),
        "explanation": list(origin.explanation),
        **table_json(table),
    }


def origin_of_arrival(table: CpuidTable, level: object) -> ContractOrigin:
    """Of a machine that came by a teleport: the level that its source told, or else what its features amount to."""
    if isinstance(level, str) and len(level) <= 32:
        try:
            known = parse_level(level)
            return ContractOrigin(str(known.number) if isinstance(known, Level) else known.name)
        except VmfError:
            pass  # a level of a newer vmf
    return ContractOrigin(str(level_of(features_of(table)) or LEVELS[0].number))
