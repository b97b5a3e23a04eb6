//! Random accesses to ports and device registers, as a broken or hostile kernel makes them. The machine
//! must survive all of them. Left out is only what ends or moves it by design: resets, sleep, the console,
//! the interrupt controllers, BARs, and where an MSI goes.

use super::block::mix;
use super::{Machine, msr};
use crate::arguments::Arguments;
use crate::console::say;
use crate::error::Error;
use crate::mmio::Window;
use crate::pci::Function;
use crate::supervisor::{self, Width};

/// Capabilities with the place of virtio registers.
const VENDOR_CAPABILITY: u8 = 0x09;

/// Numbers that are the same each time for a seed.
pub struct Random {
    state: u64,
}

impl Random {
    /// Those of a seed.
    pub fn new(seed: u64) -> Self {
        Self { state: mix(seed) }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(1);
        mix(self.state)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    /// Small numbers and edges are likelier to be taken for something.
    pub fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(16),
            1 => u64::MAX,
            2 => 1 << self.below(64),
            3 => u64::MAX << self.below(64),
            _ => self.next(),
        }
    }
}

pub fn run(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["seed", "rounds"])?;
    let rounds = arguments.number("rounds", 2000)?;
    let mut random = Random::new(arguments.number("seed", 1)?);
    let mut ports = 0;
    for _ in 0..rounds {
        ports += u64::from(touch_port(&mut random));
    }
    let mut registers = 0;
    for function in machine.functions()? {
        for _ in 0..rounds {
            touch_configuration(&mut random, &function)?;
        }
        registers += hammer_registers(&mut random, &function, rounds)?;
    }
    say!("hammer ok ports={ports} registers={registers}");
    Ok(())
}

/// Everything, with what ends or moves the machine. Whatever becomes of it, it is one of a machine's ends.
pub fn wild(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    const LOCAL_APIC: u64 = 0xfee0_0000;
    const IO_APIC: u64 = 0xfec0_0000;
    arguments.allow(&["seed", "rounds", "msrs"])?;
    let rounds = arguments.number("rounds", 20_000)?;
    let with_msrs = arguments.ranged("msrs", 0, 0, 1)? == 1;
    let mut random = Random::new(arguments.number("seed", 1)?);
    // SAFETY: registers in the low 4 GiB, which are mapped.
    let controllers = unsafe {
        [
            Window::new(LOCAL_APIC, 0x1000),
            Window::new(IO_APIC, 0x1000),
        ]
    };
    say!("hammer-wild ready");
    for _ in 0..rounds {
        match random.below(5) {
            0 => wild_port(&mut random),
            1 if with_msrs => msr::write_anything(&mut random),
            2 => {
                let controller = random.below(2) as usize;
                touch(&mut random, &controllers[controller], true)?;
            }
            _ => {
                let at = random.below(6);
                if let Some(function) = machine.functions()?.nth(at as usize) {
                    touch(&mut random, function.configuration(), true)?;
                    // Where its registers are now, if they are anywhere.
                    let _ = hammer_registers(&mut random, &function, 1);
                }
            }
        }
    }
    say!("hammer-wild ok");
    Ok(())
}

/// Any port but COM1's, on which the payload says what it does.
fn wild_port(random: &mut Random) {
    let port = random.below(0x1_0000) as u16;
    // Ports with something behind them are likelier.
    let port = if random.below(2) == 0 {
        const KNOWN: [u16; 8] = [0x20, 0x60, 0x70, 0xa0, 0xcf8, 0xcfc, 0x600, 0x610];
        KNOWN[random.below(8) as usize] + (port & 7)
    } else {
        port
    };
    if (0x3f0..0x400).contains(&port) {
        return;
    }
    let width = width(random);
    if random.below(2) == 0 {
        supervisor::port_in(port, width);
    } else {
        supervisor::port_out(port, (random.value() & 0xffff_ffff) as u32, width);
    }
}

fn width(random: &mut Random) -> Width {
    match random.below(3) {
        0 => Width::Byte,
        1 => Width::Word,
        _ => Width::Long,
    }
}

fn touch_port(random: &mut Random) -> bool {
    // The PIC, the keyboard controller's reset, COM1, PCI's ports with 0xcf9, and ACPI's registers.
    const LEFT_OUT: [(u16, u16); 6] = [
        (0x20, 0x21),
        (0xa0, 0xa1),
        (0x60, 0x64),
        (0x3f8, 0x3ff),
        (0xcf8, 0xcff),
        (0x600, 0x6ff),
    ];
    let port = random.below(0x1_0000) as u16;
    // A wide access reaches the ports after it.
    let last = port.saturating_add(3);
    if LEFT_OUT
        .iter()
        .any(|(from, to)| last >= *from && port <= *to)
    {
        return false;
    }
    let width = width(random);
    if random.below(2) == 0 {
        supervisor::port_in(port, width);
    } else {
        supervisor::port_out(port, (random.value() & 0xffff_ffff) as u32, width);
    }
    true
}

/// Reads anywhere; writes only beyond the header and the capabilities, where nothing is.
fn touch_configuration(random: &mut Random, function: &Function) -> Result<(), Error> {
    const EXTENDED: u64 = 0x100;
    let configuration = function.configuration();
    touch(random, configuration, false)?;
    touch(
        random,
        &configuration.slice(EXTENDED, configuration.length() - EXTENDED)?,
        true,
    )
}

/// Hammers all register windows that the function's virtio capabilities name.
fn hammer_registers(random: &mut Random, function: &Function, rounds: u64) -> Result<u64, Error> {
    let configuration = function.configuration();
    let mut touched = 0;
    function.enable()?;
    for capability in function.capabilities(VENDOR_CAPABILITY) {
        let kind = configuration.read8(capability + 3)?;
        // Kind 5 is the window through configuration space, which has no registers of its own.
        if !(1..=4).contains(&kind) {
            continue;
        }
        let bar = configuration.read8(capability + 4)?;
        let offset = u64::from(configuration.read32(capability + 8)?);
        let length = u64::from(configuration.read32(capability + 12)?);
        let window = function.window(bar, offset, length)?;
        for _ in 0..rounds {
            touch(random, &window, true)?;
        }
        touched += rounds;
    }
    Ok(touched)
}

fn touch(random: &mut Random, window: &Window, may_write: bool) -> Result<(), Error> {
    let size = 1 << random.below(4);
    if window.length() < size {
        return Ok(());
    }
    let offset = random.below(window.length() - size + 1);
    let value = random.value();
    let write = may_write && random.below(2) == 0;
    match (size, write) {
        (1, false) => window.read8(offset).map(drop),
        (2, false) => window.read16(offset).map(drop),
        (4, false) => window.read32(offset).map(drop),
        (_, false) => window.read64(offset).map(drop),
        (1, true) => window.write8(offset, (value & 0xff) as u8),
        (2, true) => window.write16(offset, (value & 0xffff) as u16),
        (4, true) => window.write32(offset, (value & 0xffff_ffff) as u32),
        (_, true) => window.write64(offset, value),
    }
}
