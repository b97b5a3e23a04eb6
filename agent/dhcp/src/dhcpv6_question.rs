//! Reads what a DHCPv6 client sent, as far as it matters: decoding each option that there is gives a guest
//! more code to try than it has use for.

use std::net::Ipv6Addr;

use dhcproto::Decoder;
use dhcproto::v6::{MessageType, OptionCode};

/// Identity associations of a kind, and addresses of one, that are read: clients have one each.
const LIMIT: usize = 4;
/// Bytes of an identifier (RFC 8415, 11.1: a DUID of at most 128, and its type).
const IDENTIFIER_LIMIT: usize = 130;

/// What matters of a client's message.
pub struct Question<'a> {
    pub kind: MessageType,
    pub transaction: [u8; 3],
    /// Who asks.
    pub client: Option<&'a [u8]>,
    /// Who is asked.
    pub server: Option<&'a [u8]>,
    /// The client does without an advertisement.
    pub is_rapid: bool,
    /// Of addresses.
    pub associations: Vec<Association>,
    /// The numbers of associations of temporary addresses.
    pub temporary: Vec<u32>,
    /// The numbers of associations of prefixes.
    pub prefixes: Vec<u32>,
}

/// An identity association of addresses.
pub struct Association {
    pub id: u32,
    /// The addresses that the client believes to have, or would like.
    pub addresses: Vec<Ipv6Addr>,
}

impl<'a> Question<'a> {
    /// Reads a message; `None` if it is cut short or has an identifier that is none.
    pub fn read(message: &'a [u8]) -> Option<Self> {
        let mut message = Decoder::new(message);
        let mut question = Self {
            kind: message.read_u8().ok()?.into(),
            transaction: message.read().ok()?,
            client: None,
            server: None,
            is_rapid: false,
            associations: Vec::new(),
            temporary: Vec::new(),
            prefixes: Vec::new(),
        };
        for_each_option(&mut message, |code, data| question.take(code, data))?;
        Some(question)
    }

    fn take(&mut self, code: OptionCode, data: &'a [u8]) -> Option<()> {
        match code {
            OptionCode::ClientId => self.client = Some(identifier(data)?),
            OptionCode::ServerId => self.server = Some(identifier(data)?),
            OptionCode::RapidCommit => self.is_rapid = true,
            OptionCode::IANA if self.associations.len() < LIMIT => {
                self.associations.push(association(data)?);
            }
            OptionCode::IATA if self.temporary.len() < LIMIT => {
                self.temporary.push(Decoder::new(data).read_u32().ok()?);
            }
            OptionCode::IAPD if self.prefixes.len() < LIMIT => {
                self.prefixes.push(Decoder::new(data).read_u32().ok()?);
            }
            _ => {}
        }
        Some(())
    }
}

/// Calls `take` with each option's code and data; `None` if one is cut short, or `take` says so.
fn for_each_option<'a>(
    options: &mut Decoder<'a>,
    mut take: impl FnMut(OptionCode, &'a [u8]) -> Option<()>,
) -> Option<()> {
    while let Ok(code) = options.read_u16() {
        let length = options.read_u16().ok()?;
        take(code.into(), options.read_slice(length.into()).ok()?)?;
    }
    Some(())
}

fn identifier(data: &[u8]) -> Option<&[u8]> {
    (1..=IDENTIFIER_LIMIT).contains(&data.len()).then_some(data)
}

/// Its number, two times, and options (RFC 8415, 21.4).
fn association(data: &[u8]) -> Option<Association> {
    let mut data = Decoder::new(data);
    let [id, _, _] = [
        data.read_u32().ok()?,
        data.read_u32().ok()?,
        data.read_u32().ok()?,
    ];
    let mut addresses = Vec::new();
    for_each_option(&mut data, |code, data| {
        if code == OptionCode::IAAddr && addresses.len() < LIMIT {
            let address: [u8; 16] = Decoder::new(data).read().ok()?;
            addresses.push(Ipv6Addr::from(address));
        }
        Some(())
    })?;
    Some(Association { id, addresses })
}
