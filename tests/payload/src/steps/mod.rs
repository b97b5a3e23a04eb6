//! The steps of the command line.
//!
//! | step | arguments (defaults) | what it does |
//! | --- | --- | --- |
//! | `hello` | | reports the memory and the microseconds since the entry |
//! | `cpus` | | reports the processors of the ACPI tables |
//! | `pci` | | reports each PCI function |
//! | `initrd` | | reports the initrd's size and FNV-1a hash |
//! | `idle` | `ms` (100) | halts |
//! | `busy` | `ms` (100) | computes |
//! | `exits` | `count` (10000) | reads a port that nothing answers, each time an exit to the VMM |
//! | `lines` | `count` (1000) | prints numbered lines |
//! | `console-read` | `ms` (10000) | reads a line from the console and prints it |
//! | `hang` | | halts for ever with interrupts off |
//! | `wait-power-button` | `ms` (10000) | waits for the ACPI power button |
//! | `power-off`, `reboot`, `triple-fault` | | ends the run so |
//! | `blk-id` | `disk` (0) | reports serial, capacity and features |
//! | `blk-write`, `blk-verify` | `disk` (0), `first` (0), `sectors` (the rest), `seed` (1), `size` (0: several), `depth` (8) | writes the pattern and flushes, or reads and compares it |
//! | `blk-flush` | `disk` (0) | flushes |
//! | `blk-readonly-write` | `disk` (0) | a write to a read-only disk must fail |
//! | `blk-out-of-range` | `disk` (0) | requests beyond the end must fail |
//! | `blk-boot-count` | `disk` (0), `until` (3) | counts boots in the last sector and reboots until there were so many |
//! | `blk-watch` | `disk` (0), `outages` (1), `ms` (20000) | reads until the disk went away and came back so often |
//! | `blk-grow` | `disk` (0), `ms` (20000) | waits for the interrupt that says that the disk is larger, and uses all of it |
//! | `blk-hostile` | `disk` (0) | breaks the rules of virtqueues; the device must survive a reset |
//! | `net-arp` | `interface` (0), `address`, `target` | resolves the target |
//! | `net-ping` | `interface` (0), `address`, `target`, `count` (3), `size` (56) | pings the target |
//! | `net-connect` | `interface` (0), `address`, `target`, `via` (none), `from` (20000), `port` (80), `count` (1) | asks for TCP connections |
//! | `net-stream` | `interface` (0), `address`, `target`, `via` (none), `size` (56), `tcp` (none), `ms` (600000) | pings until a line comes on the console, and counts what is lost |
//! | `net-pairs` | `interface` (0), `address`, `target`, `pairs` (2), `rounds` (1) | pings over each queue pair, with all and with one in use |
//! | `net-serve` | `interface` (0), `address`, `ms` (2000), `echoes` (no limit), `tcp` (none) | answers ARP and pings, and connections to a port |
//! | `net-feed` | `interface` (0), `address`, `port` (9000), `pause` (10), `ms` (600000) | sends numbered datagrams to whoever last sent one |
//! | `net-hear` | `interface` (0), `address`, `target`, `from` (9001), `port` (9000), `every` (50), `ms` (600000) | asks for datagrams until one comes, then only receives, and says how many have come |
//! | `net-spoof` | `interface` (0), `mac`, `address`, `target`, `count` (1) | sends ARP requests and echoes as somebody else |
//! | `balloon` | `reporting` (4), `ms` (600000) | reports free memory, gives pages when some are wanted and takes them again; answers for statistics |
//! | `vsock-serve` | `port` (52), `ms` (60000) | takes a connection of the host and sends back what comes |
//! | `vsock-connect` | `port` (1024), `bytes` (65536), `ms` (60000) | connects to the host, which sends back what comes |
//! | `vsock-refused` | `port` (1025) | nobody must listen there |
//! | `vsock-wait-reset` | `ms` (600000) | waits for the event that says that all connections are gone |
//! | `vsock-hostile` | | breaks the rules of sockets; the device must go on |
//! | `hvc-echo` | `ms` (600000) | prints what is typed on a virtio console until the line `end`, and says when its size changes |
//! | `hvc-flood` | `buffers` (256), `ms` (60000) | prints buffers of 64 KiB on a virtio console, and waits for input |
//! | `hvc-hostile` | | breaks the rules of a console's queues; the device must survive a reset |
//! | `panic` | `times` (1) | tells the panic device |
//! | `watchdog` | `ms` (1000), `feeds` (0) | starts the watchdog, feeds it, and stops to |
//! | `remember` | `mib` (16), `ms` (600000) | fills memory; for each console line `next` checks it and changes some, at `done` ends |
//! | `scribble` | `mib` (8), `ms` (600000) | checks and writes each page over and over, until a line comes on the console |
//! | `wait-generation` | `ms` (600000) | waits for another VM generation ID, and its event |
//! | `plug-wait` | `ms` (60000) | waits for something new in a PCI slot |
//! | `plug-release` | `ms` (60000) | waits until it is to let go of a device, and does |
//! | `plug-serve` | `ms` (600000) | takes devices and lets go of them until the power button is pressed |
//! | `plug-hostile` | | lets go of what nobody asked for |
//! | `hammer` | `seed` (1), `rounds` (2000) | random accesses to ports and device registers |
//! | `hammer-wild` | `seed` (1), `rounds` (20000), `msrs` (0) | the same to all there is: resets, BARs, interrupt controllers, and model-specific registers |
//! | `msr-sweep` | `seed` (1) | reads model-specific registers, writes them, and puts them back |
//! | `break-queue` | `kind` (4), `times` (1000) | breaks a device's queue 0 and resets the device |

mod balloon;
mod block;
mod block_request;
mod hammer;
mod health;
mod hostile;
mod hotplug;
mod machine;
mod msr;
mod network;
mod snapshot;
mod socket;
mod terminal;

use crate::acpi::Tables;
use crate::arguments::{self, Step};
use crate::boot::BootParameters;
use crate::console::say;
use crate::error::Error;
use crate::pci::{self, Function};
use crate::virtio::device::Device;
use crate::{clock, interrupts, memory};

/// What a step has to work with.
struct Machine<'a> {
    boot: &'a BootParameters,
}

impl Machine<'_> {
    fn tables(&self) -> Result<Tables, Error> {
        Tables::find(self.boot.acpi_root_pointer())
    }

    /// The virtio device of a type with this index, by the order of slots.
    fn device(&self, kind: u16, index: u64) -> Result<Device, Error> {
        let missing = Error::NoDevice { kind, index };
        let mut left = index;
        for function in self.functions()? {
            if Device::kind(&function)? == Some(kind) {
                if left == 0 {
                    return Device::open(function);
                }
                left -= 1;
            }
        }
        Err(missing)
    }

    fn functions(&self) -> Result<impl Iterator<Item = Function> + use<>, Error> {
        pci::functions(self.tables()?.configuration_space()?)
    }
}

/// Takes the steps of the command line and powers off.
pub fn run(boot: &BootParameters) {
    let entry_to_start = clock::since_start();
    clock::calibrate();
    say!("start us={}", clock::nanoseconds(entry_to_start) / 1000);
    let machine = Machine { boot };
    let mut passed = 0;
    let mut failed = 0;
    for step in arguments::steps(boot.command_line()) {
        let result = take(&machine, step);
        // Whatever the step used is reset and dropped by now.
        memory::release_all();
        interrupts::release_vectors();
        if let Err(error) = result {
            failed += 1;
            say!("FAIL step={} reason={}", step.name, error);
            break;
        }
        passed += 1;
    }
    say!("done passed={} failed={}", passed, failed);
    if let Err(error) = machine.tables().and_then(|tables| tables.power_off()) {
        say!("FAIL step=power-off reason={}", error);
    }
}

fn take(machine: &Machine<'_>, step: Step<'_>) -> Result<(), Error> {
    let arguments = &step.arguments;
    match step.name {
        "hello" => machine::hello(machine, arguments),
        "cpus" => machine::processors(machine, arguments),
        "pci" => machine::functions(machine, arguments),
        "initrd" => machine::initrd(machine, arguments),
        "idle" => machine::idle(arguments),
        "busy" => machine::busy(arguments),
        "hang" => machine::hang(arguments),
        "exits" => machine::exits(arguments),
        "lines" => machine::lines(arguments),
        "console-read" => machine::read_line(arguments),
        "wait-power-button" => machine::wait_for_power_button(machine, arguments),
        "power-off" => machine::power_off(machine, arguments),
        "reboot" => machine::reboot(machine, arguments),
        "triple-fault" => machine::triple_fault(arguments),
        "blk-id" => block::identify(machine, arguments),
        "blk-write" => block::write(machine, arguments),
        "blk-verify" => block::verify(machine, arguments),
        "blk-flush" => block::flush(machine, arguments),
        "blk-readonly-write" => block_request::write_read_only(machine, arguments),
        "blk-out-of-range" => block_request::out_of_range(machine, arguments),
        "blk-boot-count" => block_request::count_boots(machine, arguments),
        "blk-watch" => block_request::watch(machine, arguments),
        "blk-grow" => block_request::wait_for_growth(machine, arguments),
        "blk-hostile" => hostile::run(machine, arguments),
        "net-arp" => network::resolve(machine, arguments),
        "net-ping" => network::ping(machine, arguments),
        "net-connect" => network::connect(machine, arguments),
        "net-stream" => network::stream(machine, arguments),
        "net-pairs" => network::pairs(machine, arguments),
        "net-serve" => network::serve(machine, arguments),
        "net-feed" => network::feed(machine, arguments),
        "net-hear" => network::hear(machine, arguments),
        "net-spoof" => network::spoof(machine, arguments),
        "balloon" => balloon::run(machine, arguments),
        "vsock-serve" => socket::serve(machine, arguments),
        "vsock-connect" => socket::connect(machine, arguments),
        "vsock-refused" => socket::refused(machine, arguments),
        "vsock-wait-reset" => socket::wait_reset(machine, arguments),
        "vsock-hostile" => socket::hostile(machine, arguments),
        "hvc-echo" => terminal::echo(machine, arguments),
        "hvc-flood" => terminal::flood(machine, arguments),
        "hvc-hostile" => terminal::hostile(machine, arguments),
        "panic" => health::panic(machine, arguments),
        "watchdog" => health::watchdog(machine, arguments),
        "remember" => snapshot::remember(arguments),
        "scribble" => snapshot::scribble(arguments),
        "wait-generation" => snapshot::wait_generation(machine, arguments),
        "plug-wait" => hotplug::wait(machine, arguments),
        "plug-release" => hotplug::release(machine, arguments),
        "plug-serve" => hotplug::serve(machine, arguments),
        "plug-hostile" => hotplug::hostile(machine, arguments),
        "hammer" => hammer::run(machine, arguments),
        "hammer-wild" => hammer::wild(machine, arguments),
        "msr-sweep" => msr::sweep(arguments),
        "break-queue" => hostile::break_queue(machine, arguments),
        _ => Err(Error::UnknownStep),
    }
}
