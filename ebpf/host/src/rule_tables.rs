//! Rule tables in the two longest-prefix-match maps.
//!
//! A table is written wholly under numbers that nobody has used before a policy refers to it, and
//! removed after nobody refers to it any more: a packet sees one table, whole.

use std::collections::{BTreeMap, BTreeSet};

use aya::maps::lpm_trie::Key;
use keelson_ebpf_common::{PeerKey, PortKey, map_name, port_prefix_length};

use crate::address::to_map;
use crate::compile::{CompiledRules, PortPrefix};
use crate::error::DatapathError;
use crate::object::Object;
use crate::pin_root::PinRoot;

/// Which elements of the maps belong to which table.
#[derive(Default)]
pub struct RuleTables {
    tables: BTreeMap<u32, Elements>,
}

/// A table's elements, by prefix length and key.
#[derive(Default)]
struct Elements {
    peers: Vec<(u32, PeerKey)>,
    // With the rules' counters.
    ports: Vec<(u32, PortKey, u64)>,
}

impl RuleTables {
    /// Takes over the tables in the maps and removes those that no policy refers to, such as half
    /// of one that was being written when the process ended.
    pub fn adopt(object: &mut Object, referenced: &BTreeSet<u32>) -> Result<Self, DatapathError> {
        let mut tables: BTreeMap<u32, Elements> = BTreeMap::new();
        let mut table_of_class = BTreeMap::new();
        for element in &object.peer_classes {
            let (key, class) =
                element.map_err(DatapathError::map("read", map_name::PEER_CLASSES))?;
            let peer = key.data();
            table_of_class.insert(class, peer.table);
            let elements = tables.entry(peer.table).or_default();
            elements.peers.push((key.prefix_len(), peer));
        }
        let mut stray = Elements::default();
        for element in &object.allowed_ports {
            let (key, counter) =
                element.map_err(DatapathError::map("read", map_name::ALLOWED_PORTS))?;
            let elements = table_of_class
                .get(&key.data().class)
                .and_then(|table| tables.get_mut(table))
                .unwrap_or(&mut stray);
            elements.ports.push((key.prefix_len(), key.data(), counter));
        }
        stray.remove(object)?;
        let mut adopted = Self { tables };
        let unreferenced: Vec<u32> = adopted
            .tables
            .keys()
            .filter(|table| !referenced.contains(table))
            .copied()
            .collect();
        for table in unreferenced {
            adopted.remove(object, table)?;
        }
        Ok(adopted)
    }

    /// Writes a new table; returns its number.
    pub fn install(
        &mut self,
        object: &mut Object,
        root: &mut PinRoot,
        rules: &CompiledRules,
    ) -> Result<u32, DatapathError> {
        let class_count = u32::try_from(rules.classes.len()).unwrap_or(u32::MAX);
        let table = root.reserve_numbers(class_count.saturating_add(1))?;
        let class_number = |index: usize| table + 1 + u32::try_from(index).unwrap_or(0);
        let mut elements = Elements::default();
        for (index, class) in rules.classes.iter().enumerate() {
            for (prefix, counter) in class {
                let (bits, key) = port_key(class_number(index), *prefix);
                elements.ports.push((bits, key, *counter));
            }
        }
        for (prefix, _) in &rules.peers {
            let key = PeerKey {
                table,
                address: to_map(prefix.address()),
            };
            let bits = PeerKey::TABLE_BITS + prefix.mapped_length();
            elements.peers.push((bits, key));
        }
        let classes = rules.peers.iter().map(|(_, class)| class_number(*class));
        if let Err(error) = elements.write(object, classes) {
            // What is left over is removed when the maps are opened next, if not now.
            let _ = elements.remove(object);
            return Err(error);
        }
        self.tables.insert(table, elements);
        Ok(table)
    }

    /// Removes a table that no policy refers to; one that doesn't exist is fine.
    pub fn remove(&mut self, object: &mut Object, table: u32) -> Result<(), DatapathError> {
        match self.tables.remove(&table) {
            Some(elements) => elements.remove(object),
            None => Ok(()),
        }
    }
}

impl Elements {
    fn write(
        &self,
        object: &mut Object,
        classes: impl Iterator<Item = u32>,
    ) -> Result<(), DatapathError> {
        for (bits, key, counter) in &self.ports {
            object
                .allowed_ports
                .insert(&Key::new(*bits, *key), counter, 0)
                .map_err(DatapathError::map("write", map_name::ALLOWED_PORTS))?;
        }
        for ((bits, key), class) in self.peers.iter().zip(classes) {
            object
                .peer_classes
                .insert(&Key::new(*bits, *key), class, 0)
                .map_err(DatapathError::map("write", map_name::PEER_CLASSES))?;
        }
        Ok(())
    }

    fn remove(&self, object: &mut Object) -> Result<(), DatapathError> {
        // The peers last: as long as one is there, a later start finds the ports, too.
        for (bits, key, _) in &self.ports {
            ignore_missing(object.allowed_ports.remove(&Key::new(*bits, *key)))
                .map_err(DatapathError::map("write", map_name::ALLOWED_PORTS))?;
        }
        for (bits, key) in &self.peers {
            ignore_missing(object.peer_classes.remove(&Key::new(*bits, *key)))
                .map_err(DatapathError::map("write", map_name::PEER_CLASSES))?;
        }
        Ok(())
    }
}

/// Removing what isn't there is fine.
pub fn ignore_missing(result: Result<(), aya::maps::MapError>) -> Result<(), aya::maps::MapError> {
    match result {
        Err(aya::maps::MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(())
        }
        Err(aya::maps::MapError::KeyNotFound) => Ok(()),
        other => other,
    }
}

fn port_key(class: u32, prefix: PortPrefix) -> (u32, PortKey) {
    let (bits, protocol, port) = match prefix {
        PortPrefix::Everything => (PortKey::CLASS_BITS, 0, 0),
        PortPrefix::Protocol(protocol) => (port_prefix_length(0), protocol, 0),
        PortPrefix::Ports {
            protocol,
            port,
            bits,
        } => (port_prefix_length(u32::from(bits)), protocol, port),
    };
    let key = PortKey {
        class,
        protocol,
        port: port.to_be_bytes(),
        reserved: 0,
    };
    (bits, key)
}
