//! The datapath of a host: attach, change and detach policies, read counters.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use keelson_ebpf_common::{ALLOW_ALL, NO_ADDRESS, PolicyEntry, flag, map_name};

use crate::address::{self, MacAddress};
use crate::compile::{MAX_ENTRIES, compile};
use crate::error::DatapathError;
use crate::hook::{self, GUEST_HOOKS, HookChoice, HookMode, Hooks, Target};
use crate::nat::{Nat, uplinks};
use crate::object::Object;
use crate::pin_root::PinRoot;
use crate::policy::{EgressPolicy, InterfacePolicy, Rule};
use crate::rule_counters::RuleCounters;
use crate::rule_tables::{RuleTables, ignore_missing};
use crate::tunnel::RemoteInterface;
use crate::{gateways, grace_period, interface, limits, migration, slots, stations, tunnel};

/// How a [`Datapath`] is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatapathConfig {
    /// Folder of a BPF file system; made if it is missing. A file system is mounted at
    /// `/sys/fs/bpf` if the folder is below that and none is.
    pub pin_root: PathBuf,
    /// The hooks of interfaces attached from now on. Those that are attached keep theirs.
    pub hook: HookChoice,
    /// Flows that each interface attached from now on can have at a time, and a quarter of that of
    /// flows that wait for their first answer; about 120 bytes each, set aside at once. The least
    /// recently used make room for new ones.
    pub max_flows: u32,
}

impl Default for DatapathConfig {
    fn default() -> Self {
        Self {
            pin_root: "/sys/fs/bpf/keelson".into(),
            hook: HookChoice::Auto,
            max_flows: 1 << 14,
        }
    }
}

/// An interface that a policy is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The interface's name.
    pub name: String,
    /// Its index.
    pub ifindex: u32,
    /// The guest's MAC address.
    pub mac: MacAddress,
    /// The guest's IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// The guest's IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// How the programs are attached.
    pub hook: HookMode,
}

/// The programs, maps and hooks below one pin root. Dropping it detaches nothing.
pub struct Datapath {
    pub(crate) root: PinRoot,
    pub(crate) object: Object,
    tables: RuleTables,
    pub(crate) rule_counters: RuleCounters,
    pub(crate) mode: HookMode,
    pub(crate) max_flows: u32,
    /// Whether interfaces need maps of translations.
    pub(crate) has_services: bool,
    /// Guests of other hosts by their names; `None` until someone says who they are.
    pub(crate) remote: Option<BTreeMap<String, Vec<RemoteInterface>>>,
    /// Of uplinks; `None` until someone says what is wanted.
    pub(crate) nat: Option<Nat>,
    // What this process applied, so that applying it again costs nothing.
    applied: BTreeMap<u32, InterfacePolicy>,
}

impl Datapath {
    /// Opens or creates the datapath. Programs of interfaces that are attached are replaced in
    /// place; records of interfaces that are gone are removed. What an earlier version's maps hold is
    /// taken over.
    ///
    /// # Errors
    /// Says what to do where BPF can't be used ([`DatapathError::NotPermitted`],
    /// [`DatapathError::BpfUnavailable`], [`DatapathError::KernelTooOld`],
    /// [`DatapathError::BpffsUnavailable`]), another process has it open
    /// ([`DatapathError::InUse`]) or it is a later version's ([`DatapathError::LayoutMismatch`]).
    pub fn open(config: &DatapathConfig) -> Result<Self, DatapathError> {
        let mode = hook::choose(config.hook)?;
        let root = PinRoot::open(&config.pin_root)?;
        migration::begin(&root)?;
        let mut object = Object::load(&root)?;
        migration::carry_over(&root, &mut object)?;
        object.set_stages()?;
        let entries = entries(&object)?;
        let referenced = entries
            .values()
            .flat_map(|entry| [entry.ingress_table, entry.egress_table]);
        let tables = RuleTables::adopt(&mut object, &referenced.collect())?;
        let slots = entries.values().map(|entry| entry.slot).collect();
        let rule_counters = RuleCounters::adopt(&mut object, &slots)?;
        let mut datapath = Self {
            root,
            object,
            tables,
            rule_counters,
            mode,
            max_flows: config.max_flows,
            has_services: false,
            remote: None,
            nat: None,
            applied: BTreeMap::new(),
        };
        if datapath.read_counters(0, 0)?.is_none() {
            datapath.zero_counters(0)?;
        }
        let gone = datapath.collect_garbage()?;
        datapath.adopt_services()?;
        datapath.adopt_gateways()?;
        datapath.adopt_uplinks()?;
        datapath.adopt_tunnel()?;
        migration::finish(&mut datapath.root)?;
        if !gone.is_empty() {
            tracing::info!(interfaces = ?gone, "removed the policies of interfaces that are gone");
        }
        datapath.remove_stray_links()?;
        datapath.end_captures()?;
        Ok(datapath)
    }

    /// Puts a policy in force on an interface: the policy is written first, then the programs are
    /// attached, so keep the interface down until this returns. If it is attached already, this is
    /// [`update`](Self::update), and hooks that someone took away are attached again.
    ///
    /// # Errors
    /// [`DatapathError::InvalidPolicy`] names the field; [`DatapathError::InterfaceMissing`],
    /// [`DatapathError::Hook`], [`DatapathError::Full`]. Nothing is left half attached.
    pub fn attach(&mut self, policy: &InterfacePolicy) -> Result<Attached, DatapathError> {
        policy.validate()?;
        let ifindex = interface::index(&policy.name)?;
        let entries = entries(&self.object)?;
        stations::check_unique(policy, ifindex, &entries)?;
        for (old_ifindex, entry) in entries {
            let same_name = interface::from_bytes(&entry.name) == policy.name;
            if old_ifindex == ifindex {
                let target = target(&policy.name, ifindex, &entry);
                if hook::replace(&mut self.object, &self.root, target)? == Hooks::InForce {
                    return self.swap(ifindex, &entry, policy);
                }
                self.forget(ifindex, &entry)?;
            } else if same_name {
                self.forget(old_ifindex, &entry)?;
            }
        }
        self.attach_new(ifindex, policy)
    }

    /// Replaces the policy of an attached interface: each packet sees the old or the new one, whole.
    /// A flow that the new one allows goes on; another ends with its next packet.
    ///
    /// # Errors
    /// [`DatapathError::NotAttached`], [`DatapathError::InvalidPolicy`], [`DatapathError::Full`];
    /// the old policy stays in force.
    pub fn update(&mut self, policy: &InterfacePolicy) -> Result<(), DatapathError> {
        policy.validate()?;
        let (ifindex, entry) = self.find(&policy.name)?;
        stations::check_unique(policy, ifindex, &entries(&self.object)?)?;
        self.swap(ifindex, &entry, policy).map(drop)
    }

    /// Detaches the programs and removes the policy and counters; works after the interface is gone,
    /// too. False if nothing was attached under this name. A clsact qdisc stays: others may use it.
    ///
    /// # Errors
    /// [`DatapathError::Hook`] if the kernel doesn't let a hook go; the policy stays then.
    pub fn detach(&mut self, interface: &str) -> Result<bool, DatapathError> {
        match self.find(interface) {
            Ok((ifindex, entry)) => self.forget(ifindex, &entry).map(|()| true),
            Err(DatapathError::NotAttached { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The interfaces with a policy, by name.
    ///
    /// # Errors
    /// [`DatapathError::Map`] if the kernel doesn't let the map be read.
    pub fn attached(&self) -> Result<Vec<Attached>, DatapathError> {
        let mut list: Vec<Attached> = entries(&self.object)?
            .iter()
            .map(|(ifindex, entry)| attached(*ifindex, entry))
            .collect();
        list.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(list)
    }

    /// Removes the records of interfaces that are gone, and returns their names. Hooks that
    /// interfaces have lost are attached again.
    ///
    /// # Errors
    /// [`DatapathError::Hook`] and [`DatapathError::Map`] as the kernel says them.
    pub fn collect_garbage(&mut self) -> Result<Vec<String>, DatapathError> {
        let mut gone = Vec::new();
        for (ifindex, entry) in entries(&self.object)? {
            let recorded = interface::from_bytes(&entry.name);
            if !self.settle(ifindex, &entry, &recorded)? {
                self.forget(ifindex, &entry)?;
                gone.push(recorded);
            }
        }
        Ok(gone)
    }

    pub(crate) fn find(&self, name: &str) -> Result<(u32, PolicyEntry), DatapathError> {
        entries(&self.object)?
            .into_iter()
            .find(|(_, entry)| interface::from_bytes(&entry.name) == name)
            .ok_or_else(|| DatapathError::NotAttached {
                interface: name.to_owned(),
            })
    }

    /// Makes sure that a recorded interface's hooks are in force. False if the interface is gone.
    fn settle(
        &mut self,
        ifindex: u32,
        entry: &PolicyEntry,
        recorded: &str,
    ) -> Result<bool, DatapathError> {
        let Some(name) = interface::name(ifindex) else {
            return Ok(false);
        };
        let target = target(&name, ifindex, entry);
        if name == recorded {
            let hooks = hook::ensure(&mut self.object, &self.root, target)?;
            if hooks != Hooks::InForce {
                return Ok(false);
            }
            stations::add(&mut self.object, ifindex, entry)?;
            return Ok(true);
        }
        // Another name: the same interface, renamed, if it has our hooks; else one that came later.
        if hook::replace(&mut self.object, &self.root, target)? != Hooks::InForce {
            return Ok(false);
        }
        let renamed = PolicyEntry {
            name: interface::to_bytes(&name),
            ..*entry
        };
        self.write_entry(ifindex, renamed)?;
        Ok(true)
    }

    fn attach_new(
        &mut self,
        ifindex: u32,
        policy: &InterfacePolicy,
    ) -> Result<Attached, DatapathError> {
        // Links that are here are those of an earlier interface with this index.
        hook::remove_links(&self.root, ifindex)?;
        let taken = entries(&self.object)?;
        let slot = slots::lowest_free(taken.values().map(|entry| entry.slot))?;
        slots::fill(&mut self.object, slot, self.max_flows)?;
        if self.has_services {
            slots::ensure_translations(&mut self.object, slot, self.max_flows)?;
        }
        let entry = self.install(policy, slot, self.mode)?;
        let attach = |datapath: &mut Self| {
            limits::write(&mut datapath.object, slot, policy)?;
            datapath
                .rule_counters
                .add(&mut datapath.object, slot, policy)?;
            datapath.zero_counters(ifindex)?;
            datapath.write_entry(ifindex, entry)?;
            let target = target(&policy.name, ifindex, &entry);
            hook::ensure(&mut datapath.object, &datapath.root, target)?;
            stations::add(&mut datapath.object, ifindex, &entry)?;
            datapath.settle_nat(ifindex, &entry)
        };
        if let Err(error) = attach(self) {
            if let Err(second) = self.forget(ifindex, &entry) {
                tracing::warn!(interface = policy.name, %second, "could not undo an attach");
            }
            return Err(error);
        }
        self.applied.insert(ifindex, policy.clone());
        Ok(attached(ifindex, &entry))
    }

    fn swap(
        &mut self,
        ifindex: u32,
        old: &PolicyEntry,
        policy: &InterfacePolicy,
    ) -> Result<Attached, DatapathError> {
        if self.applied.get(&ifindex) == Some(policy) {
            return Ok(attached(ifindex, old));
        }
        limits::write(&mut self.object, old.slot, policy)?;
        if self.only_limits_differ(ifindex, policy) {
            return self.set_flags(ifindex, old, policy);
        }
        let mut entry = self.install(policy, old.slot, HookMode::from_byte(old.hook))?;
        entry.flags |= old.flags & flag::CAPTURED;
        let counted = self.rule_counters.add(&mut self.object, old.slot, policy);
        if let Err(error) = counted.and_then(|()| self.write_entry(ifindex, entry)) {
            self.remove_tables(&entry)?;
            return Err(error);
        }
        self.applied.insert(ifindex, policy.clone());
        stations::add(&mut self.object, ifindex, &entry)?;
        stations::remove(&mut self.object, old, Some(&entry))?;
        self.rule_counters
            .remove_others(&mut self.object, old.slot, Some(policy))?;
        self.remove_tables(old)?;
        if (old.ipv4, old.ipv6, old.network) != (entry.ipv4, entry.ipv6, entry.network) {
            self.settle_nat(ifindex, &entry)?;
        }
        Ok(attached(ifindex, &entry))
    }

    fn only_limits_differ(&self, ifindex: u32, policy: &InterfacePolicy) -> bool {
        self.applied.get(&ifindex).is_some_and(|applied| {
            InterfacePolicy {
                limits: policy.limits,
                ..applied.clone()
            } == *policy
        })
    }

    /// Puts a policy in force that is the old one but for its limits, which are written.
    fn set_flags(
        &mut self,
        ifindex: u32,
        old: &PolicyEntry,
        policy: &InterfacePolicy,
    ) -> Result<Attached, DatapathError> {
        let flags = flags(policy) | old.flags & flag::CAPTURED;
        if flags != old.flags {
            self.write_entry(ifindex, PolicyEntry { flags, ..*old })?;
        }
        self.applied.insert(ifindex, policy.clone());
        Ok(attached(ifindex, old))
    }

    /// Writes the policy's rules to new tables, and gives the entry that refers to them.
    fn install(
        &mut self,
        policy: &InterfacePolicy,
        slot: u32,
        mode: HookMode,
    ) -> Result<PolicyEntry, DatapathError> {
        let mut install = |field: &str, rules: &[Rule]| {
            let compiled = compile(rules).map_err(|_| {
                let problem = format!(
                    "the rules need more than {MAX_ENTRIES} entries: use fewer port ranges for \
                     networks that contain each other"
                );
                policy.invalid(field, problem)
            })?;
            self.tables
                .install(&mut self.object, &mut self.root, &compiled)
        };
        let ingress_table = install("ingress", &policy.ingress)?;
        let egress_table = match &policy.egress {
            EgressPolicy::AllowAll => Ok(ALLOW_ALL),
            EgressPolicy::Only(rules) => install("egress", rules),
        };
        let egress_table = match egress_table {
            Ok(table) => table,
            Err(error) => {
                self.tables.remove(&mut self.object, ingress_table)?;
                return Err(error);
            }
        };
        let has_ipv6 = policy.ipv6.is_some();
        let ipv6 = policy.ipv6.map(|ipv6| address::to_map(ipv6.into()));
        let link_local = has_ipv6.then(|| address::to_map(policy.mac.link_local().into()));
        Ok(PolicyEntry {
            ipv6: ipv6.unwrap_or(NO_ADDRESS),
            link_local: link_local.unwrap_or(NO_ADDRESS),
            ipv4: policy
                .ipv4
                .map_or(0, |ipv4| u32::from_ne_bytes(ipv4.octets())),
            generation: self.root.reserve_numbers(1)?,
            ingress_table,
            egress_table,
            network: policy.network,
            slot,
            mac: policy.mac.0,
            mtu: policy.mtu,
            hook: mode.to_byte(),
            flags: flags(policy),
            reserved: [0; 5],
            name: interface::to_bytes(&policy.name),
        })
    }

    /// Replaces an entry as a whole and waits until no program sees the old one: its memory and its
    /// tables may be used again when this returns.
    pub(crate) fn write_entry(
        &mut self,
        ifindex: u32,
        entry: PolicyEntry,
    ) -> Result<(), DatapathError> {
        let is_new = self.object.policies.get(&ifindex, 0).is_err();
        self.object
            .policies
            .insert(ifindex, entry, 0)
            .map_err(DatapathError::map("write", map_name::POLICIES))?;
        // Nobody reads what was not there.
        if !is_new {
            grace_period::wait();
        }
        Ok(())
    }

    fn remove_tables(&mut self, entry: &PolicyEntry) -> Result<(), DatapathError> {
        self.tables.remove(&mut self.object, entry.ingress_table)?;
        self.tables.remove(&mut self.object, entry.egress_table)
    }

    /// Removes everything about an interface. The hooks go first: what is left if this is cut short
    /// is a policy, which the next start puts in force again, not a hook that nobody knows of.
    fn forget(&mut self, ifindex: u32, entry: &PolicyEntry) -> Result<(), DatapathError> {
        match interface::name(ifindex) {
            Some(name) => hook::detach(&self.root, target(&name, ifindex, entry))?,
            None => hook::remove_links(&self.root, ifindex)?,
        }
        stations::remove(&mut self.object, entry, None)?;
        self.forget_nat(entry.slot)?;
        ignore_missing(self.object.policies.remove(&ifindex))
            .map_err(DatapathError::map("write", map_name::POLICIES))?;
        self.remove_counters(ifindex)?;
        grace_period::wait();
        self.applied.remove(&ifindex);
        self.rule_counters
            .remove_others(&mut self.object, entry.slot, None)?;
        limits::write(&mut self.object, entry.slot, &InterfacePolicy::default())?;
        slots::empty(&mut self.object, entry.slot)?;
        self.remove_tables(entry)
    }

    fn remove_stray_links(&self) -> Result<(), DatapathError> {
        let entries = entries(&self.object)?;
        let gateways = gateways::entries(&self.object)?;
        let uplinks = uplinks::entries(&self.object)?;
        let tunnel = tunnel::entry(&self.object)?;
        for ifindex in self.root.linked_interfaces()? {
            let is_known = entries.contains_key(&ifindex)
                || gateways.contains_key(&ifindex)
                || uplinks.contains_key(&ifindex)
                || tunnel.ifindex == ifindex;
            if !is_known {
                hook::remove_links(&self.root, ifindex)?;
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Datapath {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Datapath")
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

pub(crate) fn entries(object: &Object) -> Result<BTreeMap<u32, PolicyEntry>, DatapathError> {
    object
        .policies
        .iter()
        .collect::<Result<_, _>>()
        .map_err(DatapathError::map("read", map_name::POLICIES))
}

fn flags(policy: &InterfacePolicy) -> u16 {
    let isolated = if policy.isolated { flag::ISOLATED } else { 0 };
    let spans_hosts = if policy.spans_hosts {
        flag::SPANS_HOSTS
    } else {
        0
    };
    isolated | spans_hosts | policy.limits.flags() | policy.answers.flags()
}

fn target<'a>(name: &'a str, ifindex: u32, entry: &PolicyEntry) -> Target<'a> {
    Target {
        name,
        ifindex,
        mode: HookMode::from_byte(entry.hook),
        hooks: &GUEST_HOOKS,
    }
}

fn attached(ifindex: u32, entry: &PolicyEntry) -> Attached {
    Attached {
        name: interface::from_bytes(&entry.name),
        ifindex,
        mac: MacAddress(entry.mac),
        ipv4: (entry.ipv4 != 0).then(|| Ipv4Addr::from(entry.ipv4.to_ne_bytes())),
        ipv6: match address::from_map(entry.ipv6) {
            IpAddr::V6(ipv6) if !ipv6.is_unspecified() => Some(ipv6),
            _ => None,
        },
        hook: HookMode::from_byte(entry.hook),
    }
}
