//! Why a step failed.

use core::fmt;

/// A step's failure: what was tried, on what, and what was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The command line has no step of this name.
    UnknownStep,
    /// A step's argument is unknown to it or can't be read.
    BadArgument,
    /// The VMM gave no ACPI table of this signature, or one that doesn't hold what it should.
    AcpiTable([u8; 4]),
    /// No device of this virtio type with this index.
    NoDevice {
        /// Its virtio device type.
        kind: u16,
        /// Counting from 0.
        index: u64,
    },
    /// A device lacks a capability that this driver needs.
    NoCapability(&'static str),
    /// A register access outside of its window: the device's own registers say so.
    OutsideWindow {
        /// The access's byte offset.
        offset: u64,
        /// The access's bytes.
        size: u64,
        /// The window's bytes.
        length: u64,
    },
    /// An address that the page tables can't reach.
    Unmappable {
        /// Where it begins.
        base: u64,
        /// How many bytes.
        length: u64,
    },
    /// All interrupt vectors are taken.
    NoVectors,
    /// The memory for device buffers is used up.
    NoMemory {
        /// Bytes asked for.
        size: usize,
    },
    /// A device register holds something else than it should.
    Unexpected {
        /// Which.
        what: &'static str,
        /// What it holds.
        value: u64,
    },
    /// A virtqueue has no free descriptors left.
    QueueFull,
    /// Nothing came in the time that it may take.
    Timeout(&'static str),
    /// A request ended with another status than it should.
    RequestStatus {
        /// Its first sector.
        sector: u64,
        /// The status byte.
        status: u8,
        /// The status byte that was right.
        expected: u8,
    },
    /// A sector doesn't hold the pattern that it should.
    WrongData {
        /// Which.
        sector: u64,
        /// The first wrong byte.
        offset: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::UnknownStep => write!(formatter, "there is no step of this name"),
            Self::BadArgument => write!(formatter, "an argument is unknown or can't be read"),
            Self::AcpiTable(signature) => {
                let name = str::from_utf8(&signature).unwrap_or("?");
                write!(formatter, "no usable ACPI table {name}")
            }
            Self::NoDevice { kind, index } => {
                write!(
                    formatter,
                    "no virtio device of type {kind} with index {index}"
                )
            }
            Self::NoCapability(name) => write!(formatter, "the device has no {name} capability"),
            Self::OutsideWindow {
                offset,
                size,
                length,
            } => {
                write!(
                    formatter,
                    "{size} bytes at {offset:#x} are outside a window of {length:#x}"
                )
            }
            Self::Unmappable { base, length } => {
                write!(formatter, "{length:#x} bytes at {base:#x} can't be mapped")
            }
            Self::NoVectors => write!(formatter, "all interrupt vectors are taken"),
            Self::NoMemory { size } => write!(formatter, "no memory for a buffer of {size} bytes"),
            Self::Unexpected { what, value } => write!(formatter, "{what} is {value:#x}"),
            Self::QueueFull => write!(formatter, "the virtqueue has no free descriptors"),
            Self::Timeout(what) => write!(formatter, "no {what} in time"),
            Self::RequestStatus {
                sector,
                status,
                expected,
            } => {
                write!(
                    formatter,
                    "the request at sector {sector} ended with status {status}, not {expected}"
                )
            }
            Self::WrongData { sector, offset } => {
                write!(formatter, "sector {sector} is wrong from byte {offset} on")
            }
        }
    }
}
