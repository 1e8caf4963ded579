"""What a guest of this backend can be shown, and that it is shown just that.

The capability is what KVM supports, less

- what needs a local APIC, which portable machines do not have (APIC, x2APIC, TSC deadline), and what describes more
  than one vCPU;
- what vmf does not carry or the guest could not use: machine checks, MTRRs (their MSRs are carried all the same),
  performance counters, nested virtualisation, SMM, power management, MONITOR, AMX (needs a permission per process),
  SGX, control-flow enforcement (part of its state is in no MSR), MPX;
- features whose content is an MSR of the host (ARCH_CAPABILITIES, CORE_CAPABILITIES, OSVW): another host has another
  value;
- the paravirtual leaves at 0x40000000.

The TSC's rate is told in leaf 0x15.
"""

from __future__ import annotations

from typing import Final

from vmf.cpuid.compare import Difference, diff
from vmf.cpuid.contract import with_tsc
from vmf.cpuid.features import RUNTIME_FEATURES, features, features_of
from vmf.cpuid.layout import assemble, xsave_components
from vmf.cpuid.table import CpuidTable
from vmf_cpu_kvm.convert import XsaveLayout

_DROPPED: Final = features(
    """
    apic x2apic extapic tsc_deadline_timer arat ht cmp_legacy topoext nodeid_msr
    mce mca mtrr monitor mwaitx acpi tm tm2 est pbe dts ds_cpl dtes64 pn xtpr cid sdbg pdcm dca smx vmx svm skinit wdt
    osvw ibs lwp perfctr_core perfctr_nb perfctr_llc ptsc bpext
    intel_pt arch_lbr sgx sgx_lc sgx_keys enqcmd uintr shstk ibt mpx key_locker pconfig hreset hybrid_cpu
    arch_perfmon_ext cqm rdt_a tme
    amx_tile amx_int8 amx_bf16 amx_fp16 amx_complex xfd arch_capabilities core_capabilities
    rtm_always_abort tsx_force_abort rdpru irperf mcommit invlpgb amd_ppin cppc mba_amd
    overflow_recov succor hwa smca perfmon_v2 amd_lbr_v2 amd_lbr_pmc_freeze
    """.split()  # noqa: SIM905 - a list this long reads better in rows
)

_KEPT_LEAVES: Final = frozenset({0x0, 0x1, 0x2, 0x4, 0x7, 0xD, *range(0x80000000, 0x80000009), 0x80000021})


def capability(supported: CpuidTable, tsc_khz: int) -> CpuidTable:
    """The widest contract for a host whose KVM supports that."""
    present = features_of(supported) - _DROPPED - RUNTIME_FEATURES
    table = assemble(supported, present, keep_leaf=lambda leaf: leaf in _KEPT_LEAVES, unknown_components=False)
    return with_tsc(table, tsc_khz)


def overridden(requested: CpuidTable, presented: CpuidTable) -> list[Difference]:
    """Where KVM presents something else than it was told to. `presented` may hold leaves nobody asked for: zeros."""
    return diff(requested, presented)


def xsave_layout(supported: CpuidTable) -> XsaveLayout:
    """Where this host's KVM has the components of the XSAVE area."""
    return XsaveLayout(
        {
            index: (component.offset, component.size)
            for index, component in xsave_components(supported).items()
            if index >= 2 and component.size and not component.supervisor
        }
    )


def allowed_components(contract: CpuidTable) -> int:
    """XCR0 bits that the contract lets a guest set; 1 without XSAVE."""
    leaf = contract.lookup(0xD, 0)
    return leaf.eax | leaf.edx << 32 or 1


def misplaced_components(contract: CpuidTable, layout: XsaveLayout) -> list[str]:
    """XSAVE components that the contract puts elsewhere than this host's KVM has them."""
    found = []
    for index, component in xsave_components(contract).items():
        if index < 2 or component.supervisor:
            continue
        own = layout.components.get(index)
        if own != (component.offset, component.size):
            here = "does not have it" if own is None else f"has {own[1]} bytes at {own[0]}"
            found.append(f"{component.name}: {component.size} bytes at {component.offset}, and KVM here {here}")
    return found
