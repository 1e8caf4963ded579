"""Names of CPUID feature bits: the tables, and nothing but the tables.

Every bit that Intel (SDM vol. 2A, CPUID; Architecture Instruction Set Extensions reference) or AMD (APM vol. 3,
appendix E) documents as a feature has a name here: the one Linux shows in /proc/cpuinfo where it has one, with a
prefix where two vendors use one word for two bits (`intel_stibp`, `amd_stibp`). A row reads from bit 0 upwards; "-"
is a bit nobody documents, "*N" leaves out N bits.

Registers that are not in `FEATURE_BITS` hold numbers; `vmf.cpuid.layout` says what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

Register = tuple[int, int, str]
"""(leaf, subleaf, "eax" | "ebx" | "ecx" | "edx")."""

_ROWS: Final[Mapping[Register, str]] = {
    (0x1, 0, "ecx"): """
        pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1
        sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor""",
    (0x1, 0, "edx"): """
        fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr
        sse sse2 ss ht tm ia64 pbe""",
    (0x6, 0, "eax"): """
        dtherm ida arat - pln ecmd pts hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req - hdc turbo_max3
        hwp_cap_change hwp_peci hwp_flexible hwp_fast_access hfi hwp_ignore_idle - hwp_ctl thread_director
        therm_intr_msr""",
    (0x6, 0, "ecx"): "aperfmperf *2 epb",
    (0x7, 0, "ebx"): """
        fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx
        rdt_a avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel_pt avx512pf avx512er
        avx512cd sha_ni avx512bw avx512vl""",
    (0x7, 0, "ecx"): """
        prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni
        avx512_bitalg tme avx512_vpopcntdq - la57 mpx_mawau0 mpx_mawau1 mpx_mawau2 mpx_mawau3 mpx_mawau4 rdpid
        key_locker bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks""",
    (0x7, 0, "edx"): """
        - sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr *2 avx512_vp2intersect srbds_ctrl md_clear
        rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16
        avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities
        spec_ctrl_ssbd""",
    (0x7, 1, "eax"): """
        sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc *4 fred
        lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma *2 lam msrlist *2 invd_disable_post_bios_done movrs""",
    (0x7, 1, "ebx"): "intel_ppin pbndkb - cpuid_maxval_lim_rmvd",
    (0x7, 1, "ecx"): "*2 legacy_reduced_isa - sipi64 msr_imm",
    (0x7, 1, "edx"): """
        *4 avx_vnni_int8 avx_ne_convert *2 amx_complex - avx_vnni_int16 *2 utmr prefetchi user_msr - uiret_uif
        cet_sss avx10 - apx_f""",
    (0x7, 2, "edx"): "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no uc_lock_disable monitor_mitg_no",
    (0xD, 1, "eax"): "xsaveopt xsavec xgetbv1 xsaves xfd",
    (0xF, 0, "edx"): "- cqm_llc",
    (0xF, 1, "edx"): "cqm_occup_llc cqm_mbm_total cqm_mbm_local",
    (0x10, 0, "ebx"): "- cat_l3 cat_l2 mba",
    (0x12, 0, "eax"): "sgx1 sgx2 *3 sgx_enclv sgx_encls_c sgx_everifyreport2 *2 sgx_eupdatesvn sgx_edeccssa",
    (0x14, 0, "ebx"): """
        pt_cr3_filter pt_psb_cyc pt_ip_filter pt_mtc ptwrite pt_pwr_events pt_psb_pmi pt_event_trace
        pt_tnt_disable""",
    (0x14, 0, "ecx"): "pt_topa pt_topa_multi pt_single_range pt_trace_transport *27 pt_lip",
    (0x19, 0, "ebx"): "aeskle - aeskl_wide - kl_iwkey_backup",
    (0x24, 0, "ebx"): "*16 avx10_128 avx10_256 avx10_512",
    (0x80000001, 0, "ecx"): """
        lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt -
        lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx
        admskextn""",
    (0x80000001, 0, "edx"): """
        amd_fpu amd_vme amd_de amd_pse amd_tsc amd_msr amd_pae amd_mce amd_cx8 amd_apic - syscall amd_mtrr
        amd_pge amd_mca amd_cmov amd_pat amd_pse36 - mp nx - mmxext amd_mmx amd_fxsr fxsr_opt pdpe1gb rdtscp -
        lm 3dnowext 3dnow""",
    (0x80000007, 0, "ebx"): "overflow_recov succor hwa smca",
    (0x80000007, 0, "edx"): """
        ts fid vid ttp htc stc 100mhzsteps hw_pstate nonstop_tsc cpb eff_freq_ro proc_feedback acc_power
        connected_standby rapl fast_cppc""",
    (0x80000008, 0, "ebx"): """
        clzero irperf xsaveerptr invlpgb rdpru - mba_amd - mcommit wbnoinvd *2 amd_ibpb int_wbinvd amd_ibrs
        amd_stibp ibrs_always_on stibp_always_on ibrs_preferred ibrs_same_mode efer_lmsle_unsupported
        invlpgb_nested - amd_ppin amd_ssbd virt_ssbd ssb_no cppc amd_psfd btc_no ibpb_ret brs""",
    (0x8000000A, 0, "edx"): """
        npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists pmc_virt - pausefilter -
        pfthreshold avic - v_vmsave_vmload vgif gmet x2avic sss_check v_spec_ctrl rogpt - host_mce_override
        tlbictl vnmi ibs_virt ext_lvt_avic nested_vmcb_check bus_lock_threshold idle_hlt""",
    (0x8000001B, 0, "eax"): """
        ibs_ffv ibs_fetch ibs_op ibs_rdwropcnt ibs_opcnt ibs_brntrgt ibs_opcntext ibs_riptchk ibs_opfuse
        ibs_fetchctlextd ibs_opdata4 ibs_zen4""",
    (0x8000001F, 0, "eax"): """
        sme sev vm_page_flush sev_es sev_snp vmpl rmpquery vmpl_sss secure_tsc tsc_aux_virt hw_cache_coherent
        sev_64bit restricted_injection alternate_injection debug_swap prevent_host_ibs vte vmgexit_parameter
        virtual_tom ibs_virt_guest *4 vmsa_reg_prot smt_protection""",
    (0x80000021, 0, "eax"): """
        no_nested_data_bp fsgs_non_serializing lfence_rdtsc smm_pgcfg_lock - verw_clear null_sel_clr_base
        upper_address_ignore autoibrs no_smm_ctl_msr amd_fsrs amd_fsrc - prefetch_ctl_msr *3 cpuid_user_dis epsf
        *5 eraps *2 sbpb ibpb_brtype srso_no srso_user_kernel_no srso_msr_fix""",
    (0x80000021, 0, "ecx"): "- tsa_sq_no tsa_l1_no",
    (0x80000022, 0, "eax"): "perfmon_v2 amd_lbr_v2 amd_lbr_pmc_freeze",
}  # fmt: skip

_PARTIAL: Final[Mapping[Register, int]] = {
    (0x6, 0, "ecx"): 0x0000_00FF,  # [15:8] counts the classes of the Thread Director
    (0x24, 0, "ebx"): 0xFFFF_FF00,  # [7:0] is the AVX10 version
}
"""Registers where only these bits are features; the others are a number."""

FEATURE_MASKS: Final[Mapping[Register, int]] = {register: _PARTIAL.get(register, 0xFFFF_FFFF) for register in _ROWS}
"""Which bits of which registers are features, known or not. Nothing outside them is one."""


def _parse(row: str) -> dict[int, str]:
    names: dict[int, str] = {}
    bit = 0
    for word in row.split():
        if word.startswith("*"):
            bit += int(word[1:])
            continue
        if word != "-":
            names[bit] = word
        bit += 1
    if bit > 32:
        raise AssertionError(f"a register of {bit} bits: {row}")
    return names


FEATURE_BITS: Final[Mapping[Register, Mapping[int, str]]] = {register: _parse(row) for register, row in _ROWS.items()}
"""Register to bit number to name."""

MIRRORS: Final[Mapping[str, str]] = {
    name: name.removeprefix("amd_") for name in FEATURE_BITS[0x80000001, 0, "edx"].values() if name.startswith("amd_")
}
"""AMD repeats leaf 1 EDX bits in leaf 0x80000001; Intel has zeros there. The repeat says nothing new."""

ALIASES: Final[Mapping[str, str]] = {
    "3dnow!": "3dnow",
    "clflsh": "clflush",
    "clfsh": "clflush",
    "cmpxchg16b": "cx16",
    "cmpxchg8b": "cx8",
    "constant_tsc": "nonstop_tsc",
    "cr8l": "cr8_legacy",
    "ibpb": "amd_ibpb",
    "invtsc": "nonstop_tsc",
    "lahf": "lahf_lm",
    "lahf_sahf": "lahf_lm",
    "lzcnt": "abm",
    "mwait": "monitor",
    "pclmul": "pclmulqdq",
    "sha": "sha_ni",
    "sse3": "pni",
    "tsc_deadline": "tsc_deadline_timer",
    "x87": "fpu",
    "xd": "nx",
}
"""Other words in use for the same bit (vendors' manuals, psABI, other VMMs)."""

# What a feature cannot be used without. SDM vol. 1 ch. 13-16 (detection rules of SSE, AVX, AVX-512, AMX),
# SDM vol. 3 (paging modes, XSAVE-managed supervisor state), APM vol. 2 ch. 15 (SVM).
_NEEDS: Final[str] = """
    mmx: fpu | fxsr: fpu | cmov: fpu | sse: fxsr | sse2: sse | pni: sse2 | ssse3: pni | sse4_1: ssse3
    sse4_2: sse4_1 | sse4a: pni | misalignsse: sse | aes: sse2 | pclmulqdq: sse2 | sha_ni: sse2 | gfni: sse2
    mmxext: mmx | 3dnow: mmx | 3dnowext: 3dnow | fxsr_opt: fxsr | cx16: cx8 lm
    lm: pae msr | nx: pae | syscall: msr | lahf_lm: lm | la57: lm | pdpe1gb: lm | pcid: lm | lam: lm | pse36: pse
    fsgsbase: lm
    rdtscp: tsc | tsc_adjust: tsc msr | nonstop_tsc: tsc | tsc_deadline_timer: apic tsc
    x2apic: apic msr | extapic: apic | mtrr: msr | mca: mce | arch_capabilities: msr | pat: msr
    clflushopt: clflush | clwb: clflush | pks: lm
    xsaveopt: xsave | xsavec: xsave | xgetbv1: xsave | xsaves: xsavec | xfd: xsaves | pku: xsave lm | ospke: pku
    osxsave: xsave | xsaveerptr: fxsr | mpx: xsave | lwp: xsave
    avx: xsave sse4_2 | fma: avx | f16c: avx | avx2: avx | xop: avx | fma4: avx | vaes: avx aes
    vpclmulqdq: avx pclmulqdq | avx_vnni: avx2 | avx_ifma: avx2 | avx_ne_convert: avx2 | avx_vnni_int8: avx2
    avx_vnni_int16: avx2 | sha512: avx2 | sm3: avx | sm4: avx2
    avx512f: avx2 fma f16c | avx512dq: avx512f | avx512ifma: avx512f | avx512pf: avx512f | avx512er: avx512f
    avx512cd: avx512f | avx512bw: avx512f | avx512vl: avx512f | avx512vbmi: avx512bw | avx512_vbmi2: avx512bw
    avx512_vnni: avx512f | avx512_bitalg: avx512bw | avx512_vpopcntdq: avx512f | avx512_4vnniw: avx512f
    avx512_4fmaps: avx512f | avx512_vp2intersect: avx512f | avx512_bf16: avx512bw | avx512_fp16: avx512bw avx512vl
    avx10: avx512f avx512vl | avx10_128: avx10 | avx10_256: avx10 | avx10_512: avx10
    amx_tile: xsave lm | amx_int8: amx_tile | amx_bf16: amx_tile | amx_fp16: amx_tile | amx_complex: amx_tile
    apx_f: xsave lm | shstk: xsaves | enqcmd: xsaves | uintr: xsaves lm | user_msr: uintr | uiret_uif: uintr
    cet_sss: shstk | aeskle: key_locker | aeskl_wide: aeskle | kl_iwkey_backup: key_locker
    sgx_lc: sgx | sgx_keys: sgx | sgx1: sgx | sgx2: sgx1 | fred: lkgs lm | lkgs: lm | msr_imm: msr | wrmsrns: msr
    msrlist: msr | tsx_force_abort: rtm | tsxldtrk: rtm | dtes64: dts | ds_cpl: dts
    cqm_llc: cqm | cqm_occup_llc: cqm_llc | cqm_mbm_total: cqm_llc | cqm_mbm_local: cqm_llc
    cat_l3: rdt_a | cat_l2: rdt_a | mba: rdt_a
    pt_cr3_filter: intel_pt | pt_psb_cyc: intel_pt | pt_ip_filter: intel_pt | pt_mtc: intel_pt | ptwrite: intel_pt
    pt_pwr_events: intel_pt | pt_psb_pmi: intel_pt | pt_event_trace: intel_pt | pt_tnt_disable: intel_pt
    pt_topa: intel_pt | pt_topa_multi: pt_topa | pt_single_range: intel_pt | pt_trace_transport: intel_pt
    hwp_notify: hwp | hwp_act_window: hwp | hwp_epp: hwp | hwp_pkg_req: hwp | hwp_cap_change: hwp | hwp_peci: hwp
    hwp_flexible: hwp | hwp_fast_access: hwp | hwp_ignore_idle: hwp | skinit: svm
    amd_lbr_pmc_freeze: amd_lbr_v2 | perfmon_v2: perfctr_core | sev_es: sev | sev_snp: sev_es
    invlpgb_nested: svm
"""

_SVM_BITS = FEATURE_BITS[0x8000000A, 0, "edx"].values()
_IBS_BITS = FEATURE_BITS[0x8000001B, 0, "eax"].values()


def _parse_needs() -> dict[str, frozenset[str]]:
    needs: dict[str, frozenset[str]] = {}
    for item in _NEEDS.replace("\n", "|").split("|"):
        name, _, required = item.partition(":")
        if required.strip():
            needs[name.strip()] = frozenset(required.split())
    needs |= {name: frozenset({"svm"}) for name in _SVM_BITS}
    needs |= {name: frozenset({"ibs"}) for name in _IBS_BITS}
    needs |= {mirror: frozenset({original}) for mirror, original in MIRRORS.items()}
    return needs


NEEDS: Final[Mapping[str, frozenset[str]]] = _parse_needs()
"""Feature name to the names it directly needs; all of them."""
