//! The peer: a bridge whose packets pass nftables, with sets instead of chains of rules.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::Context as _;

use super::hosts::{CLIENT, Rule, SERVER};

/// How it is set up, for the report.
pub const METHOD: &str = "anti-spoofing in netdev chains at each guest's device, established flows accepted by conntrack \
                          before anything else, then one lookup in a hash set of (source address, port), in the forward \
                          chain, through br_netfilter, since this kernel has no conntrack of bridges";

/// Puts the same policy in force in the calling thread's namespace. The bridge's packets go through
/// the chains of IP.
pub fn apply(rules: &[Rule]) -> anyhow::Result<()> {
    std::fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "1")
        .context("let the bridge's packets pass nftables (br_netfilter)")?;
    let mut text = String::new();
    for (end, device) in [(CLIENT, "hc"), (SERVER, "hs")] {
        let mac = keelson_ebpf::MacAddress(end.mac);
        let address = end.address;
        write!(
            text,
            "table netdev {device} {{
                chain ingress {{
                    type filter hook ingress device {device} priority 0; policy drop;
                    ether saddr != {mac} drop
                    ether type ip ip saddr {address} accept
                    ether type arp arp saddr ether {mac} arp saddr ip {address} accept
                }}
            }}
            "
        )?;
    }
    text.push_str("table ip filter {\n set allowed { type ipv4_addr . inet_proto . inet_service;");
    let elements: Vec<String> = rules
        .iter()
        .map(|rule| format!("{} . {} . {}", rule.peer, rule.protocol, rule.port))
        .collect();
    if !elements.is_empty() {
        write!(text, " elements = {{ {} }}", elements.join(", "))?;
    }
    write!(
        text,
        "}}
        chain to_server {{
            ip saddr . meta l4proto . th dport @allowed accept
            {}
        }}
        chain forward {{
            type filter hook forward priority 0; policy drop;
            ct state established,related accept
            ct state invalid drop
            ip daddr vmap {{ {} : jump to_server }}
            ip saddr {} accept
        }}
        }}\n",
        if rules.is_empty() { "accept" } else { "drop" },
        SERVER.address,
        SERVER.address,
    )?;
    load(&text)
}

/// Loads rules in the calling thread's namespace.
pub fn load(rules: &str) -> anyhow::Result<()> {
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .context("start nft (Debian's package nftables)")?;
    nft.stdin
        .take()
        .context("nft's input")?
        .write_all(rules.as_bytes())?;
    anyhow::ensure!(nft.wait()?.success(), "nft refused the rules");
    Ok(())
}
