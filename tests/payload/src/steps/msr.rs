//! Model-specific registers, as a broken or hostile kernel uses them.

use super::hammer::Random;
use crate::arguments::Arguments;
use crate::console::say;
use crate::error::Error;
use crate::supervisor::{read_msr, write_msr};

/// Where processors and hypervisors have registers: architectural ones, machine checks, PMUs and x2APIC;
/// Hyper-V's; KVM's; AMD's.
const RANGES: [(u32, u32); 6] = [
    (0x0, 0x1000),
    (0x4000_0000, 0x4000_0200),
    (0x4b56_4d00, 0x4b56_4d20),
    (0xc000_0080, 0xc000_0400),
    (0xc001_0000, 0xc001_0400),
    (0xc001_1000, 0xc001_1100),
];

/// What a sweep only reads: it would take away what this program runs on (time, the local APIC, long mode,
/// segments), or has the processor or the hypervisor write memory where the value says.
const LEFT_OUT: [(u32, u32); 9] = [
    // The time stamp counter, KVM's clock and wall clock of old, the APIC's base.
    (0x10, 0x13),
    (0x1b, 0x1c),
    (0x3b, 0x3c),
    // The APIC's deadline, and its registers in x2APIC mode.
    (0x6e0, 0x6e1),
    (0x800, 0x900),
    // Hypervisors' own.
    (0x4000_0000, 0x4000_0200),
    (0x4b56_4d00, 0x4b56_4e00),
    // EFER, and where segments begin.
    (0xc000_0080, 0xc000_0081),
    (0xc000_0100, 0xc000_0103),
];

/// Reads every register; writes those that there are, and puts them back. A register is there each time that
/// it is asked for, whatever was written to it, or never.
pub fn sweep(arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["seed"])?;
    let mut random = Random::new(arguments.number("seed", 1)?);
    let (mut there, mut missing, mut taken) = (0, 0, 0);
    for register in RANGES.iter().flat_map(|(from, to)| *from..*to) {
        let Some(value) = read_msr(register) else {
            if read_msr(register).is_some() {
                return Err(inconsistent(register));
            }
            missing += 1;
            continue;
        };
        there += 1;
        if LEFT_OUT
            .iter()
            .any(|(from, to)| (*from..*to).contains(&register))
        {
            continue;
        }
        for _ in 0..4 {
            // SAFETY: what moves this program or memory is left out.
            taken += u64::from(unsafe { write_msr(register, random.value()) });
        }
        // SAFETY: it is what the register had.
        unsafe { write_msr(register, value) };
        if read_msr(register).is_none() {
            return Err(inconsistent(register));
        }
    }
    say!("msr-sweep ok there={there} missing={missing} taken={taken}");
    Ok(())
}

/// Any value to any register.
pub fn write_anything(random: &mut Random) {
    let (from, to) = RANGES[random.below(RANGES.len() as u64) as usize];
    let register = from + random.below(u64::from(to - from)) as u32;
    // SAFETY: none: what becomes of this program is for the test to see.
    unsafe { write_msr(register, random.value()) };
}

fn inconsistent(register: u32) -> Error {
    Error::Unexpected {
        what: "model-specific register that is there only sometimes",
        value: u64::from(register),
    }
}
