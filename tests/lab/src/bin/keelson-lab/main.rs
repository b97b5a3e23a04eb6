//! The lab's command line: `keelson-lab up`, `exec`, `put`, `get`, `status`, `down`,
//! `guest-initrd`.

mod arguments;
mod terminal;

use std::io::{IsTerminal, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use keelson_lab::protocol::Exec;
use keelson_lab::{KernelFiles, Lab, LabError, LabOptions, LabState, StreamFrame, guest_initrd};

use arguments::{Arguments, Command, ExecArguments, UpArguments};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("keelson-lab: {error:#}");
            // As ssh does: 255 is this program's failure, everything else is the command's.
            ExitCode::from(255)
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let folder = arguments.state_folder();
    match &arguments.command {
        Command::Up(up) => self::up(up, &folder)?,
        Command::Exec(exec) => return self::exec(exec, &folder),
        Command::Put { from, to } => Lab::attach(&folder)?.put(from, to)?,
        Command::Get { from, to } => Lab::attach(&folder)?.get(from, to)?,
        Command::Down => return down(&folder),
        Command::Status => status(&folder)?,
        Command::GuestInitrd { kernel, out } => {
            let started = Instant::now();
            guest_initrd::write(&KernelFiles::find(kernel)?, out)?;
            eprintln!(
                "wrote {} in {} ms",
                out.display(),
                started.elapsed().as_millis()
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn up(arguments: &UpArguments, folder: &Path) -> Result<()> {
    let started = Instant::now();
    let lab = Lab::boot(&LabOptions {
        kernel: arguments.kernel.clone(),
        memory_mib: arguments.memory,
        cpus: arguments.cpus,
        disk_mib: arguments.disk,
        files: arguments.files.clone(),
        tools: arguments.tools.clone(),
        modules: arguments.modules.clone(),
        lifetime: Duration::from_secs(arguments.lifetime * 60),
        state_folder: Some(folder.to_path_buf()),
        detached: true,
        ..LabOptions::default()
    })?;
    eprintln!(
        "lab is up: kernel {}, process {}, {} ms from start to /dev/kvm, {} ms in all",
        lab.status()?.kernel,
        lab.state().process_id,
        lab.boot_time().as_millis(),
        started.elapsed().as_millis(),
    );
    Ok(())
}

fn exec(arguments: &ExecArguments, folder: &Path) -> Result<ExitCode> {
    let lab = Lab::attach(folder)?;
    let raw = arguments
        .tty
        .then(terminal::RawTerminal::enter)
        .transpose()?;
    let mut running = lab.spawn(&Exec {
        arguments: arguments.command.clone(),
        environment: arguments.environment.clone(),
        directory: arguments.directory.clone(),
        terminal: raw.as_ref().map(|raw| raw.size),
        timeout_seconds: arguments.timeout,
    })?;
    let input = running.input();
    // The process ends with the command, whether or not this thread still reads.
    std::thread::spawn(move || {
        let mut chunk = vec![0; 64 << 10];
        while let Ok(length @ 1..) = std::io::stdin().read(&mut chunk) {
            if input.write(&chunk[..length]).is_err() {
                return;
            }
        }
        let _command_has_ended = input.close();
    });
    loop {
        match running.next_frame()? {
            StreamFrame::Stdout(bytes) => {
                let mut stdout = std::io::stdout().lock();
                stdout
                    .write_all(&bytes)
                    .and_then(|()| stdout.flush())
                    .context("writing output")?;
            }
            StreamFrame::Stderr(bytes) => std::io::stderr().lock().write_all(&bytes)?,
            StreamFrame::Ended(status) => {
                drop(raw);
                return Ok(ExitCode::from(
                    u8::try_from(status.shell_code()).unwrap_or(255),
                ));
            }
        }
    }
}

fn down(folder: &Path) -> Result<ExitCode> {
    match Lab::attach(folder) {
        Ok(lab) => lab.shut_down()?,
        Err(error @ LabError::NotUp { .. }) => eprintln!("{error}"),
        Err(error) => return Err(error.into()),
    }
    Ok(ExitCode::SUCCESS)
}

fn status(folder: &Path) -> Result<()> {
    let state = LabState::read(folder)?;
    let status = Lab::attach(folder)?.status()?;
    if !status.kvm {
        bail!(
            "the lab runs but has no /dev/kvm: see {}",
            state.console.display()
        );
    }
    let line = format!(
        "up {:.0} s: kernel {}, /dev/kvm present, process {}, console {}",
        status.uptime_seconds,
        status.kernel,
        state.process_id,
        state.console.display()
    );
    if std::io::stdout().is_terminal() {
        println!("{line}");
    } else {
        println!("{}", serde_json::to_string(&status)?);
    }
    Ok(())
}
