//! Runs of the programs on frames that nobody sent, and what runs cost.

use std::os::fd::OwnedFd;
use std::time::Duration;

use aya::programs::{ProgramInfo, TestRun as _, TestRunOptions, TestRunResult};
use keelson_ebpf_common::{Direction, program_name};

use crate::datapath::Datapath;
use crate::error::DatapathError;
use crate::interface;
use crate::object::chain;

/// What the programs say about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Pass,
    /// It is dropped.
    Drop,
}

/// What a program's runs cost so far, on all interfaces, while the kernel counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunCost {
    /// How often it ran.
    pub runs: u64,
    /// Time spent in it.
    pub time: Duration,
}

/// Makes the kernel count the cost of all programs on this machine for as long as the result lives
/// (`BPF_ENABLE_STATS`); the counting adds some 20 ns to each run.
///
/// # Errors
/// [`DatapathError::Load`] where the kernel refuses.
pub fn count_run_costs() -> Result<OwnedFd, DatapathError> {
    aya::sys::enable_stats(aya::sys::Stats::RunTime).map_err(|error| DatapathError::Load {
        what: "the statistics of programs".into(),
        problem: chain(&error),
    })
}

impl Datapath {
    /// Asks the programs about a frame as if an attached interface saw it; it is counted and may
    /// open a flow like any other. For diagnosis and tests.
    ///
    /// # Errors
    /// [`DatapathError::NotAttached`]; [`DatapathError::Load`] if the kernel refuses the frame, which
    /// must have more than its Ethernet and IP headers and fit a page.
    pub fn evaluate(
        &mut self,
        interface: &str,
        direction: Direction,
        frame: &[u8],
    ) -> Result<Verdict, DatapathError> {
        let (ifindex, _) = self.find(interface)?;
        let result = self.run(name_of(direction), ifindex, frame, None, 1)?;
        Ok(verdict(&result))
    }

    /// As [`evaluate`](Self::evaluate), with what the frame became: services' packets are translated.
    ///
    /// # Errors
    /// As there.
    pub fn translate(
        &mut self,
        interface: &str,
        direction: Direction,
        frame: &[u8],
    ) -> Result<(Verdict, Vec<u8>), DatapathError> {
        let (ifindex, _) = self.find(interface)?;
        self.try_program(name_of(direction), ifindex, frame)
    }

    /// As [`translate`](Self::translate), on the bridge of a network with services: toward the network,
    /// or from it.
    ///
    /// # Errors
    /// [`DatapathError::InterfaceMissing`]; [`DatapathError::Load`] as there.
    pub fn translate_at_gateway(
        &mut self,
        bridge: &str,
        direction: Direction,
        frame: &[u8],
    ) -> Result<(Verdict, Vec<u8>), DatapathError> {
        let ifindex = interface::index(bridge)?;
        let name = match direction {
            Direction::ToGuest => program_name::SERVICE_FROM_HOST,
            Direction::FromGuest => program_name::SERVICE_TO_HOST,
        };
        self.try_program(name, ifindex, frame)
    }

    /// As [`translate`](Self::translate), on an uplink: what leaves by it, or comes by it.
    ///
    /// # Errors
    /// [`DatapathError::InterfaceMissing`]; [`DatapathError::Load`] as there.
    pub fn translate_at_uplink(
        &mut self,
        uplink: &str,
        direction: Direction,
        frame: &[u8],
    ) -> Result<(Verdict, Vec<u8>), DatapathError> {
        let ifindex = interface::index(uplink)?;
        let name = match direction {
            Direction::FromGuest => program_name::TO_UPLINK,
            Direction::ToGuest => program_name::FROM_UPLINK,
        };
        self.try_program(name, ifindex, frame)
    }

    fn try_program(
        &mut self,
        name: &'static str,
        ifindex: u32,
        frame: &[u8],
    ) -> Result<(Verdict, Vec<u8>), DatapathError> {
        let mut after = vec![0; frame.len() + 256];
        let result = self.run(name, ifindex, frame, Some(&mut after), 1)?;
        after.truncate(usize::try_from(result.data_size_out).unwrap_or(0));
        Ok((verdict(&result), after))
    }

    /// As [`evaluate`](Self::evaluate), `repeat` times; the average time of one run.
    ///
    /// # Errors
    /// As there.
    pub fn time_frame(
        &mut self,
        interface: &str,
        direction: Direction,
        frame: &[u8],
        repeat: u32,
    ) -> Result<Duration, DatapathError> {
        let (ifindex, _) = self.find(interface)?;
        let result = self.run(name_of(direction), ifindex, frame, None, repeat)?;
        Ok(result.duration)
    }

    /// What the program of a direction cost since it was loaded, see [`count_run_costs`].
    ///
    /// # Errors
    /// [`DatapathError::Load`] where the kernel does not say.
    pub fn run_cost(&mut self, direction: Direction) -> Result<RunCost, DatapathError> {
        let info = self.program_info(name_of(direction))?;
        Ok(RunCost {
            runs: info.run_count(),
            time: info.run_time(),
        })
    }

    /// How many instructions the kernel's verifier went through to check each program; it gives up
    /// after a million. `None` where the kernel doesn't say.
    ///
    /// # Errors
    /// [`DatapathError::Load`] if the kernel refuses to tell about a program.
    pub fn verified_instructions(
        &mut self,
    ) -> Result<Vec<(&'static str, Option<u32>)>, DatapathError> {
        let mut counts = Vec::new();
        for name in program_name::ALL {
            let info = self.program_info(name)?;
            counts.push((name, info.verified_instruction_count()));
        }
        Ok(counts)
    }

    fn program_info(&mut self, name: &'static str) -> Result<ProgramInfo, DatapathError> {
        self.object
            .program(name)?
            .info()
            .map_err(|error| DatapathError::Load {
                what: format!("what the kernel knows of the program {name}"),
                problem: chain(&error),
            })
    }

    fn run(
        &mut self,
        name: &'static str,
        ifindex: u32,
        frame: &[u8],
        after: Option<&mut [u8]>,
        repeat: u32,
    ) -> Result<TestRunResult, DatapathError> {
        /// Bytes of `struct __sk_buff` up to and with `ifindex`, which is the last of eleven words.
        const CONTEXT_LENGTH: usize = 44;

        let mut context = [0; CONTEXT_LENGTH];
        context[CONTEXT_LENGTH - 4..].copy_from_slice(&ifindex.to_ne_bytes());
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: after,
            ctx_in: Some(&context),
            repeat,
            ..TestRunOptions::new()
        };
        let program = self.object.program(name)?;
        program
            .test_run(options)
            .map_err(|error| DatapathError::Load {
                what: format!("a test frame of {} bytes", frame.len()),
                problem: chain(&error),
            })
    }
}

fn verdict(result: &TestRunResult) -> Verdict {
    /// `TC_ACT_SHOT`; everything else goes on.
    const SHOT: u32 = 2;

    match result.return_value {
        SHOT => Verdict::Drop,
        _ => Verdict::Pass,
    }
}

const fn name_of(direction: Direction) -> &'static str {
    match direction {
        Direction::FromGuest => program_name::FROM_GUEST,
        Direction::ToGuest => program_name::TO_GUEST,
    }
}
