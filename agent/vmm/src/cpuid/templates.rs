//! Named processors: which of the host's features a guest is shown.
//!
//! A template hides what it doesn't have and asks for what it has, so that guests on it are shown the
//! same features on every host of a vendor. Numbers (family, model, caches, address sizes) stay the
//! host's.

use kvm_bindings::kvm_cpuid_entry2;

use crate::config::CpuTemplate;
use crate::error::VmmError;

/// A register of a leaf: what a template must have, and what it may have besides.
struct Mask {
    function: u32,
    index: u32,
    register: Register,
    needed: u32,
    allowed: u32,
}

#[derive(Debug, Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// CPUID.1:EDX: the baseline of x86-64 (FPU, VME, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR,
/// PGE, MCA, CMOV, PAT, PSE36, CLFSH, MMX, FXSR, SSE, SSE2).
const BASE_EDX: u32 = 0x078b_fbff;
/// What of it every kernel needs.
const BASE_EDX_NEEDED: u32 =
    1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 9 | 1 << 15 | 3 << 23 | 3 << 25;

/// CPUID.1:ECX of v2: SSE3, SSSE3, CX16, SSE4.1, SSE4.2, POPCNT.
const V2_ECX: u32 = 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23;
/// PCLMULQDQ, x2APIC, TSC deadline, AES, hypervisor, RDRAND: no part of the levels, but no host of
/// the last years lacks them, and guests use them.
const COMMON_ECX: u32 = 1 << 1 | 1 << 21 | 1 << 24 | 1 << 25 | 1 << 30 | 1 << 31;
/// And of v3: FMA, MOVBE, XSAVE, OSXSAVE (which the guest switches itself), AVX, F16C.
const V3_ECX: u32 = 1 << 12 | 1 << 22 | 1 << 26 | 1 << 28 | 1 << 29;
const OSXSAVE: u32 = 1 << 27;
/// CPUID.7.0:EBX of v3: BMI1, AVX2, BMI2.
const V3_LEAF7_EBX: u32 = 1 << 3 | 1 << 5 | 1 << 8;
/// FSGSBASE, SMEP, ERMS, INVPCID, RDSEED, ADX, SMAP, CLFLUSHOPT.
const COMMON_LEAF7_EBX: u32 = 1 | 1 << 7 | 1 << 9 | 1 << 10 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 23;
/// CPUID.7.0:EDX: what mitigations of the processors' bugs need (MD_CLEAR, IBRS, STIBP, L1D_FLUSH,
/// ARCH_CAPABILITIES, SSBD). Hiding them would make guests less safe.
const SAFETY_LEAF7_EDX: u32 = 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 31;
/// CPUID.0x80000001:ECX: LAHF in 64-bit mode (v2), LZCNT (v3); CR8, 3DNow prefetch and the topology
/// leaves on AMD, without which Linux takes threads for cores.
const LAHF: u32 = 1;
const LZCNT: u32 = 1 << 5;
const COMMON_EXTENDED_ECX: u32 = 1 << 4 | 1 << 8 | 1 << 22;
/// CPUID.0x80000001:EDX: SYSCALL, NX, long mode; 1 GiB pages, RDTSCP, and AMD's copies of leaf 1.
const EXTENDED_EDX_NEEDED: u32 = 1 << 11 | 1 << 20 | 1 << 29;
const EXTENDED_EDX: u32 = EXTENDED_EDX_NEEDED | 1 << 26 | 1 << 27 | 1 << 25 | 0x0183_f3ff;
/// XCR0 of v3: x87, SSE, AVX.
const XCR0_V3: u32 = 7;

fn masks(v3: bool) -> Vec<Mask> {
    let pick = |of_v3: u32, of_v2: u32| if v3 { of_v3 } else { of_v2 };
    let mask = |function, index, register, needed, besides: u32| Mask {
        function,
        index,
        register,
        needed,
        allowed: needed | besides,
    };
    let needed = V2_ECX | pick(V3_ECX, 0);
    // v2 has no XSAVE: with an XCR0 other than the host's, KVM would switch it at each exit and entry,
    // which alone made an emulated host's guests half as fast.
    let xsave = pick(OSXSAVE, 0);
    vec![
        mask(1, 0, Register::Edx, BASE_EDX_NEEDED, BASE_EDX | 1 << 28),
        mask(1, 0, Register::Ecx, needed, COMMON_ECX | xsave),
        mask(7, 0, Register::Ebx, pick(V3_LEAF7_EBX, 0), COMMON_LEAF7_EBX),
        mask(7, 0, Register::Ecx, 0, 0),
        mask(7, 0, Register::Edx, 0, SAFETY_LEAF7_EDX),
        mask(7, 1, Register::Eax, 0, 0),
        mask(7, 1, Register::Ecx, 0, 0),
        mask(7, 1, Register::Edx, 0, 0),
        mask(0xd, 0, Register::Eax, 0, XCR0_V3),
        mask(0xd, 0, Register::Edx, 0, 0),
        // XSAVEOPT, XSAVEC and XGETBV with 1, but no supervisor states.
        mask(0xd, 1, Register::Eax, 0, 7),
        mask(0xd, 1, Register::Ecx, 0, 0),
        mask(
            0x8000_0001,
            0,
            Register::Ecx,
            LAHF | pick(LZCNT, 0),
            COMMON_EXTENDED_ECX,
        ),
        mask(
            0x8000_0001,
            0,
            Register::Edx,
            EXTENDED_EDX_NEEDED,
            EXTENDED_EDX,
        ),
    ]
}

/// Makes `entries`, which a host's KVM supports, those of `model`.
pub(super) fn apply(
    model: CpuTemplate,
    entries: &mut Vec<kvm_cpuid_entry2>,
) -> Result<(), VmmError> {
    let v3 = match model {
        CpuTemplate::Host => return Ok(()),
        CpuTemplate::V2 => false,
        CpuTemplate::V3 => true,
    };
    for mask in masks(v3) {
        let same = |e: &&mut kvm_cpuid_entry2| (e.function, e.index) == (mask.function, mask.index);
        let Some(entry) = entries.iter_mut().find(same) else {
            if mask.needed == 0 {
                continue;
            }
            return Err(lacks(model, &mask, mask.needed));
        };
        let register = match mask.register {
            Register::Eax => &mut entry.eax,
            Register::Ebx => &mut entry.ebx,
            Register::Ecx => &mut entry.ecx,
            Register::Edx => &mut entry.edx,
        };
        if mask.needed & !*register != 0 {
            return Err(lacks(model, &mask, mask.needed & !*register));
        }
        *register &= mask.allowed;
    }
    // States that XCR0 lacks, performance counters, and leaves of features that are hidden.
    let states = if v3 { 0..3 } else { 0..0 };
    entries.retain(|entry| match entry.function {
        0xa | 0x12 | 0x14 | 0x1d | 0x1e => false,
        0xd => states.contains(&entry.index),
        _ => true,
    });
    Ok(())
}

fn lacks(model: CpuTemplate, mask: &Mask, bits: u32) -> VmmError {
    VmmError::CpuTemplate {
        template: model.name(),
        leaf: mask.function,
        register: match mask.register {
            Register::Eax => "EAX",
            Register::Ebx => "EBX",
            Register::Ecx => "ECX",
            Register::Edx => "EDX",
        },
        bits,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(function: u32, index: u32) -> impl Strategy<Value = kvm_cpuid_entry2> {
        any::<[u32; 4]>().prop_map(move |[eax, ebx, ecx, edx]| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        })
    }

    fn host(seed: Vec<kvm_cpuid_entry2>) -> Vec<kvm_cpuid_entry2> {
        let mut entries = seed;
        for mask in masks(true) {
            for e in &mut entries {
                if (e.function, e.index) == (mask.function, mask.index) {
                    match mask.register {
                        Register::Eax => e.eax |= mask.needed,
                        Register::Ebx => e.ebx |= mask.needed,
                        Register::Ecx => e.ecx |= mask.needed,
                        Register::Edx => e.edx |= mask.needed,
                    }
                }
            }
        }
        entries
    }

    proptest! {
        #[test]
        fn only_what_a_template_has_is_shown(
            a in (entry(1, 0), entry(7, 0), entry(7, 1), entry(0xd, 0), entry(0xd, 9), entry(0x8000_0001, 0))
        ) {
            let entries = host(vec![a.0, a.1, a.2, a.3, a.4, a.5]);
            for (model, v3) in [(CpuTemplate::V2, false), (CpuTemplate::V3, true)] {
                let mut shown = entries.clone();
                apply(model, &mut shown).unwrap();
                prop_assert!(shown.iter().all(|e| (e.function, e.index) != (0xd, 9)));
                let leaf7 = shown.iter().find(|e| (e.function, e.index) == (7, 0)).unwrap();
                prop_assert_eq!(leaf7.ebx & V3_LEAF7_EBX, if v3 { V3_LEAF7_EBX } else { 0 });
                prop_assert_eq!(leaf7.ecx, 0);
                // v2 has no XSAVE, and nothing that tells of its states.
                let leaf1 = shown.iter().find(|e| e.function == 1).unwrap();
                prop_assert_eq!(leaf1.ecx >> 26 & 1, u32::from(v3));
                prop_assert_eq!(shown.iter().any(|e| e.function == 0xd), v3);
                // Once more changes nothing.
                let once = shown.clone();
                apply(model, &mut shown).unwrap();
                prop_assert_eq!(shown, once);
            }
        }
    }

    #[test]
    fn a_host_without_a_feature_is_told_which() {
        let leaf1 = kvm_cpuid_entry2 {
            function: 1,
            edx: BASE_EDX,
            ..Default::default()
        };
        let error = apply(CpuTemplate::V2, &mut vec![leaf1])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("x86-64-v2") && error.contains("ECX"),
            "{error}"
        );
    }
}
