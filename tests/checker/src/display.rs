use std::fmt;

use crate::operation::{
    Compare, Delete, KeyValue, Keys, Operation, Outcome, Put, Range, RangeResult, Request,
    Response, Txn, TxnOperation, TxnResult,
};
use crate::text::text;

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            client,
            call,
            end,
            request,
            outcome,
        } = self;
        match outcome {
            Outcome::Unknown => write!(f, "client {client} [{call}, ?] ")?,
            _ => write!(f, "client {client} [{call}, {end}] ")?,
        }
        write!(f, "{request} -> {outcome}")
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok(response) => write!(f, "{response}"),
            Self::Refused(refusal) => write!(f, "refused: {refusal:?}"),
            Self::Failed => write!(f, "failed"),
            Self::Unknown => write!(f, "unknown"),
        }
    }
}

impl fmt::Display for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(key) => write!(f, "{}", text(key)),
            Self::Range(first, end) => write!(f, "[{}, {})", text(first), text(end)),
            Self::From(first) => write!(f, "[{}, …)", text(first)),
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Range(range) => write!(f, "{range}"),
            Self::Put(put) => write!(f, "{put}"),
            Self::Delete(delete) => write!(f, "{delete}"),
            Self::Txn(txn) => write!(f, "{txn}"),
            Self::Compact(revision) => write!(f, "compact at {revision}"),
            Self::LeaseGrant(id) => write!(f, "grant lease {id:x}"),
            Self::LeaseRevoke(id) => write!(f, "revoke lease {id:x}"),
        }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "range {}", self.keys)?;
        if self.revision != 0 {
            write!(f, " at revision {}", self.revision)?;
        }
        if self.limit != 0 {
            write!(f, " limit {}", self.limit)?;
        }
        for (set, name) in [
            (self.count_only, " count only"),
            (self.keys_only, " keys only"),
            (self.serializable, " serializable"),
        ] {
            f.write_str(if set { name } else { "" })?;
        }
        Ok(())
    }
}

impl fmt::Display for Put {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "put {} = {}", text(&self.key), text(&self.value))?;
        match self.lease {
            0 => Ok(()),
            lease => write!(f, " lease {lease:x}"),
        }
    }
}

impl fmt::Display for Delete {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "delete {}", self.keys)
    }
}

impl fmt::Display for Txn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "txn if")?;
        for Compare {
            keys,
            relation,
            target,
        } in &self.compares
        {
            write!(f, " {keys} {relation:?} {target:?}")?;
        }
        for (word, operations) in [("then", &self.success), ("else", &self.failure)] {
            write!(f, " {word}")?;
            for operation in operations {
                match operation {
                    TxnOperation::Range(range) => write!(f, " {range};")?,
                    TxnOperation::Put(put) => write!(f, " {put};")?,
                    TxnOperation::Delete(delete) => write!(f, " {delete};")?,
                }
            }
        }
        Ok(())
    }
}

impl fmt::Display for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Range { revision, result } => write!(f, "{result} (revision {revision})"),
            Self::Put { revision, prev_kv } => {
                write!(f, "ok (revision {revision})")?;
                prev_kv.iter().try_for_each(|kv| write!(f, " was {kv}"))
            }
            Self::Delete {
                revision,
                deleted,
                prev_kvs,
            } => {
                write!(f, "deleted {deleted} (revision {revision})")?;
                prev_kvs.iter().try_for_each(|kv| write!(f, " was {kv}"))
            }
            Self::Txn {
                revision,
                succeeded,
                results,
            } => {
                let branch = if *succeeded { "then" } else { "else" };
                write!(f, "{branch} (revision {revision})")?;
                results.iter().try_for_each(|result| match result {
                    TxnResult::Range(result) => write!(f, " {result};"),
                    TxnResult::Put { prev_kv: Some(kv) } => write!(f, " put, was {kv};"),
                    TxnResult::Put { prev_kv: None } => write!(f, " put;"),
                    TxnResult::Delete { deleted, .. } => write!(f, " deleted {deleted};"),
                })
            }
            Self::Done => write!(f, "done"),
        }
    }
}

impl fmt::Display for RangeResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// More would hide what matters.
        const SHOWN: usize = 8;
        write!(f, "{} keys", self.count)?;
        for kv in self.kvs.iter().take(SHOWN) {
            write!(f, ", {kv}")?;
        }
        if self.kvs.len() > SHOWN {
            write!(f, ", …")?;
        }
        f.write_str(if self.more { ", and more" } else { "" })
    }
}

impl fmt::Display for KeyValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            key,
            value,
            create_revision,
            mod_revision,
            version,
            lease,
        } = self;
        write!(
            f,
            "{} = {} (created {create_revision}, modified {mod_revision}, version {version}",
            text(key),
            text(value)
        )?;
        if *lease != 0 {
            write!(f, ", lease {lease:x}")?;
        }
        f.write_str(")")
    }
}
