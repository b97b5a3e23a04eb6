//! The show with the payload guest, which runs on any KVM.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use keelson_vmm_tests::{pattern_sector, payload};

use crate::host::Host;
use crate::report::Report;
use crate::{FALSE_ADDRESS, GATEWAY, GUEST, apply, network_show, show_adoption, show_ingress};

/// Sectors that the host writes and the guest reads, and as many the other way round.
const SECTORS: u64 = 4096;
const SPOOFED_FRAMES: u64 = 10;

/// Runs the payload guest from its manifest to its end.
pub fn show(
    report: &mut Report,
    host: &mut Host,
    folder: &Path,
    stay: impl FnOnce(),
) -> Result<()> {
    let seed = u64::from(std::process::id()) << 20;
    let image = folder.join("data.img");
    write_image(&image, seed)?;
    let disk = format!("path: {}", image.display());
    apply(report, host, folder, &disk, &machine(seed));
    for (what, line) in [
        ("the guest runs", "payload: hello ok"),
        (
            "it reads what the host wrote on its disk",
            "payload: blk-verify ok",
        ),
        ("it writes and flushes its disk", "payload: blk-write ok"),
        ("it pings its gateway, the host", "payload: net-ping ok"),
    ] {
        report.step(what, || Ok(((), host.console_line("web", line)?)));
    }
    report.step("what it sends under a false address is dropped", || {
        host.console_line("web", "payload: net-spoof ok")?;
        let ip = host.dropped("web", "fromGuest", "spoofed-ipv4")?;
        let arp = host.dropped("web", "fromGuest", "spoofed-arp")?;
        ensure!(
            ip + arp == SPOOFED_FRAMES,
            "counted {ip} IPv4 and {arp} ARP frames"
        );
        host.console_line("web", "payload: net-stream ready")?;
        Ok((
            (),
            format!("counted as spoofed: {ip} IPv4 packets, {arp} ARP packets"),
        ))
    });
    show_ingress(report, host);
    show_adoption(report, host);
    network_show::show(report, host, folder);
    report.step("it pinged its gateway all the time", || {
        let (sent, lost) = network_show::end_stream(host, folder, "web")?;
        ensure!(lost == 0, "{lost} of {sent} pings were lost");
        Ok(((), format!("{sent} of {sent} pings answered")))
    });
    stay();
    report.step("the power button shuts it down", || {
        host.console_line("web", "payload: wait-power-button ready")?;
        host.keelson(&["stop", "web"])?;
        Ok(((), host.console_line("web", "payload: done")?))
    });
    report.step("the host finds what it wrote in the image", || {
        let bytes = fs::read(&image)?;
        let sectors = bytes.as_chunks::<512>().0;
        for sector in SECTORS..2 * SECTORS {
            let index = usize::try_from(sector)?;
            let found = sectors.get(index).context("the image is too short")?;
            ensure!(
                *found == pattern_sector(sector, seed + 1),
                "sector {sector} differs"
            );
        }
        Ok(((), format!("{SECTORS} sectors are equal")))
    });
    Ok(())
}

fn write_image(image: &Path, seed: u64) -> Result<()> {
    let mut bytes = Vec::new();
    for sector in 0..SECTORS {
        bytes.extend(pattern_sector(sector, seed));
    }
    bytes.resize(usize::try_from(4 * SECTORS)? * 512, 0);
    fs::write(image, bytes).with_context(|| format!("write {}", image.display()))
}

/// What the guest is and does, as the rest of its manifest's spec.
fn machine(seed: u64) -> String {
    let count = SPOOFED_FRAMES / 2;
    let steps = [
        "hello".to_owned(),
        format!("blk-verify:first=0,sectors={SECTORS},seed={seed}"),
        format!(
            "blk-write:first={SECTORS},sectors={SECTORS},seed={}",
            seed + 1
        ),
        format!("net-ping:address={GUEST},target={GATEWAY}"),
        format!("net-spoof:address={FALSE_ADDRESS},target={GATEWAY},count={count}"),
        format!("net-stream:address={GUEST},target={GATEWAY}"),
        "wait-power-button:ms=600000".into(),
    ];
    format!(
        "  memory: 64Mi\n  kernel:\n    image: {}\n    commandLine: console=ttyS0 -- {}\n",
        payload().display(),
        steps.join(" "),
    )
}
