//! Steps about devices that come and go while this program runs, by the registers that the ACPI methods of
//! the PCI slots use.

use super::Machine;
use super::machine::{MASKED, route};
use crate::acpi::InterruptLine;
use crate::arguments::Arguments;
use crate::clock::Deadline;
use crate::console::say;
use crate::error::Error;
use crate::interrupts::Vector;
use crate::supervisor::{self, Width};
use crate::virtio::device::wait_for;

const POWER_BUTTON: u32 = 1;

/// The registers: three of 32 bits, with a bit for each slot.
struct Slots {
    base: u16,
}

impl Slots {
    fn find(machine: &Machine<'_>) -> Result<Self, Error> {
        let base = machine.tables()?.port_region(*b"HPRG")?;
        Ok(Self { base })
    }

    /// The slots with something new in them, since the last call.
    fn inserted(&self) -> u32 {
        supervisor::port_in(self.base, Width::Long)
    }

    /// The slots that are to be let go of, since the last call.
    fn asked(&self) -> u32 {
        supervisor::port_in(self.base + 4, Width::Long)
    }

    fn eject(&self, slots: u32) {
        supervisor::port_out(self.base + 8, slots, Width::Long);
    }
}

/// Waits until there is something new in a slot.
pub fn wait(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["ms"])?;
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 60_000)?);
    let slots = Slots::find(machine)?;
    let line = machine.tables()?.event_interrupt()?;
    let vector = Vector::allocate()?;
    say!("plug-wait ready");
    let inserted = on_event(line, &vector, deadline, "new device", || {
        some(slots.inserted())
    })?;
    let slot = inserted.trailing_zeros();
    if !is_there(machine, slot)? {
        return Err(Error::Unexpected {
            what: "slot without its new device",
            value: slot.into(),
        });
    }
    say!("plug-wait ok slot={slot}");
    Ok(())
}

/// Waits until a device is to be let go of, and does it.
pub fn release(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["ms"])?;
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 60_000)?);
    let slots = Slots::find(machine)?;
    let line = machine.tables()?.event_interrupt()?;
    let vector = Vector::allocate()?;
    say!("plug-release ready");
    let asked = on_event(line, &vector, deadline, "request for a device", || {
        some(slots.asked())
    })?;
    let slot = asked.trailing_zeros();
    slots.eject(1 << slot);
    if is_there(machine, slot)? {
        return Err(Error::Unexpected {
            what: "slot that was let go of",
            value: slot.into(),
        });
    }
    say!("plug-release ok slot={slot}");
    Ok(())
}

/// Obeys until the power button is pressed.
pub fn serve(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["ms"])?;
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 600_000)?);
    let slots = Slots::find(machine)?;
    let events = machine.tables()?.port_region(*b"EVRG")?;
    let line = machine.tables()?.event_interrupt()?;
    // There are not many of them, and none is given back.
    let vector = Vector::allocate()?;
    say!("plug-serve ready");
    loop {
        let seen = on_event(line, &vector, deadline, "power button", || {
            let pressed = supervisor::port_in(events, Width::Byte) & POWER_BUTTON;
            let (inserted, asked) = (slots.inserted(), slots.asked());
            (pressed | inserted | asked != 0).then_some((pressed, inserted, asked))
        })?;
        let (pressed, inserted, asked) = seen;
        for slot in bits(inserted) {
            say!("plug-serve inserted slot={slot}");
        }
        for slot in bits(asked) {
            slots.eject(1 << slot);
            say!("plug-serve released slot={slot}");
        }
        if pressed != 0 {
            say!("plug-serve ok");
            return Ok(());
        }
    }
}

/// Lets go of what nobody asked for, in every width; all of it must stay.
pub fn hostile(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&[])?;
    let slots = Slots::find(machine)?;
    let before = machine.functions()?.count();
    for width in [Width::Byte, Width::Word, Width::Long] {
        for offset in 0..12 {
            let _ = supervisor::port_in(slots.base + offset, width);
            supervisor::port_out(slots.base + offset, u32::MAX, width);
        }
    }
    let after = machine.functions()?.count();
    if after != before {
        return Err(Error::Unexpected {
            what: "number of devices",
            value: after as u64,
        });
    }
    say!("plug-hostile ok functions={after}");
    Ok(())
}

fn is_there(machine: &Machine<'_>, slot: u32) -> Result<bool, Error> {
    Ok(machine
        .functions()?
        .any(|function| u32::from(function.slot()) == slot))
}

fn bits(bits: u32) -> impl Iterator<Item = u32> {
    (0..32).filter(move |bit| bits & 1 << bit != 0)
}

/// Looks at each event until there is something.
fn on_event<T>(
    line: InterruptLine,
    vector: &Vector,
    deadline: Deadline,
    what: &'static str,
    mut look: impl FnMut() -> Option<T>,
) -> Result<T, Error> {
    route(line, u64::from(vector.number()))?;
    let seen = wait_for(deadline, what, || Ok(look()));
    route(line, MASKED)?;
    seen
}

fn some(bits: u32) -> Option<u32> {
    (bits != 0).then_some(bits)
}
