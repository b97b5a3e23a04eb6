//! Finds transactions that would change one key twice.

use std::collections::HashSet;

use crate::{KeyRange, StateError, Txn, TxnOp};

/// What one list of operations changes, nested transactions included.
#[derive(Default)]
struct Changes<'a> {
    puts: HashSet<&'a [u8]>,
    deletes: Vec<&'a KeyRange>,
}

/// Refuses what etcd means to refuse (3.4 overlooks deletes without an end): a key put twice, or put beside a delete that covers it. Both branches
/// of a transaction may change the same key, since only one is done. As in etcd, deletes may
/// overlap, and nested transactions are compared in their order with what precedes them.
pub(crate) fn check(txn: &Txn) -> Result<(), StateError> {
    changes(&txn.then)?;
    changes(&txn.or_else)?;
    Ok(())
}

fn changes(ops: &[TxnOp]) -> Result<Changes<'_>, StateError> {
    let deletes = ops
        .iter()
        .filter_map(|op| match op {
            TxnOp::Delete(delete) => Some(&delete.range),
            _ => None,
        })
        .collect();
    let mut here = Changes {
        puts: HashSet::new(),
        deletes,
    };
    for op in ops {
        if let TxnOp::Txn(nested) = op {
            here.add_branches(changes(&nested.then)?, changes(&nested.or_else)?)?;
        }
    }
    for op in ops {
        if let TxnOp::Put(put) = op {
            here.add_put(&put.key)?;
        }
    }
    Ok(here)
}

impl<'a> Changes<'a> {
    fn add_branches(&mut self, then: Self, or_else: Self) -> Result<(), StateError> {
        for key in &then.puts {
            self.add_put(key)?;
        }
        for key in &or_else.puts {
            if !then.puts.contains(key) {
                self.add_put(key)?;
            }
        }
        self.deletes.extend(then.deletes);
        self.deletes.extend(or_else.deletes);
        Ok(())
    }

    fn add_put(&mut self, key: &'a [u8]) -> Result<(), StateError> {
        let deleted = self.deletes.iter().any(|range| range.contains(key));
        if deleted || !self.puts.insert(key) {
            return Err(StateError::DuplicateKey);
        }
        Ok(())
    }
}
