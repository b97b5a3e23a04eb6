//! Any object, whatever its kind.

use std::fmt;
use std::path::{Component, Path};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    API_VERSION, ApiError, Disk, FieldError, Host, Network, ObjectMeta, PortForward, SecurityGroup,
    Service, VirtualMachine,
};

/// The longest path that the kernel takes (`PATH_MAX`).
const PATH_LIMIT: usize = 4096;

/// A kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// [`Host`]
    Host,
    /// [`Disk`]
    Disk,
    /// [`Network`]
    Network,
    /// [`PortForward`]
    PortForward,
    /// [`SecurityGroup`]
    SecurityGroup,
    /// [`Service`]
    Service,
    /// [`VirtualMachine`]
    VirtualMachine,
}

impl Kind {
    /// Every kind, in the order in which the objects of one manifest depend on each other.
    pub const ALL: [Self; 7] = [
        Self::Host,
        Self::Disk,
        Self::Network,
        Self::SecurityGroup,
        Self::Service,
        Self::VirtualMachine,
        Self::PortForward,
    ];

    /// The name in manifests.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Host => "Host",
            Self::Disk => "Disk",
            Self::Network => "Network",
            Self::PortForward => "PortForward",
            Self::SecurityGroup => "SecurityGroup",
            Self::Service => "Service",
            Self::VirtualMachine => "VirtualMachine",
        }
    }

    /// The lower-case plural, as in keys and on the command line.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Host => "hosts",
            Self::Disk => "disks",
            Self::Network => "networks",
            Self::PortForward => "portforwards",
            Self::SecurityGroup => "securitygroups",
            Self::Service => "services",
            Self::VirtualMachine => "virtualmachines",
        }
    }

    /// The short name on the command line.
    pub fn short(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Disk => "disk",
            Self::Network => "net",
            Self::PortForward => "pf",
            Self::SecurityGroup => "sg",
            Self::Service => "svc",
            Self::VirtualMachine => "vm",
        }
    }

    pub(crate) fn names() -> String {
        Self::ALL.map(Self::as_str).join(", ")
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = ApiError;

    /// Reads a kind as a person would write it: in any case, singular, plural, or short.
    fn from_str(text: &str) -> Result<Self, ApiError> {
        let lower = text.to_ascii_lowercase();
        let singular = lower.strip_suffix('s').unwrap_or(&lower);
        Self::ALL
            .into_iter()
            .find(|kind| kind.as_str().eq_ignore_ascii_case(singular) || kind.short() == singular)
            .ok_or_else(|| ApiError::Kind(text.into()))
    }
}

/// What all kinds of objects have in common.
pub trait Resource:
    Clone + fmt::Debug + PartialEq + Serialize + for<'de> Deserialize<'de> + Send + Sync + 'static
{
    /// The object's kind.
    const KIND: Kind;
    /// The object's metadata.
    fn metadata(&self) -> &ObjectMeta;
    /// The object's metadata, to change.
    fn metadata_mut(&mut self) -> &mut ObjectMeta;
    /// Whether both want the same.
    fn same_spec(&self, other: &Self) -> bool;
    /// Takes the status of an earlier version of the object.
    fn take_status(&mut self, other: &Self);
    /// Wraps the object.
    fn into_object(self) -> Object;
}

macro_rules! resources {
    ($($type:ident),*) => {
        /// An object of any kind.
        // Objects are handled one at a time, never kept in large arrays.
        #[allow(clippy::large_enum_variant)]
        #[derive(Clone, Debug, PartialEq, Eq, Serialize)]
        #[serde(untagged)]
        pub enum Object {
            $(
                #[doc = concat!("A [`", stringify!($type), "`].")]
                $type($type),
            )*
        }

        $(
            impl Resource for $type {
                const KIND: Kind = Kind::$type;

                fn metadata(&self) -> &ObjectMeta {
                    &self.metadata
                }

                fn metadata_mut(&mut self) -> &mut ObjectMeta {
                    &mut self.metadata
                }

                fn same_spec(&self, other: &Self) -> bool {
                    self.spec == other.spec
                }

                fn take_status(&mut self, other: &Self) {
                    self.status = other.status.clone();
                }

                fn into_object(self) -> Object {
                    Object::$type(self)
                }
            }
        )*

        impl Object {
            /// The object's kind.
            pub fn kind(&self) -> Kind {
                match self { $(Self::$type(_) => Kind::$type,)* }
            }

            /// The object's metadata.
            pub fn metadata(&self) -> &ObjectMeta {
                match self { $(Self::$type(object) => &object.metadata,)* }
            }

            /// The object's metadata, to change.
            pub fn metadata_mut(&mut self) -> &mut ObjectMeta {
                match self { $(Self::$type(object) => &mut object.metadata,)* }
            }

            /// Whether both are of one kind and want the same.
            pub fn same_spec(&self, other: &Self) -> bool {
                match (self, other) {
                    $((Self::$type(one), Self::$type(two)) => one.spec == two.spec,)*
                    _ => false,
                }
            }

            /// Takes the status of an earlier version; of another kind, nothing.
            pub fn take_status(&mut self, other: &Self) {
                match (self, other) {
                    $((Self::$type(one), Self::$type(two)) => one.take_status(two),)*
                    _ => {}
                }
            }

            /// What is wrong with the object, as far as it can be seen by itself.
            pub fn validate(&self) -> Vec<FieldError> {
                let mut errors = Vec::new();
                self.metadata().validate(&mut errors);
                match self { $(Self::$type(object) => object.spec.validate(&mut errors),)* }
                errors
            }

            /// Reads an object from its JSON document.
            ///
            /// # Errors
            /// [`ApiError::ApiVersion`], [`ApiError::Kind`], or [`ApiError::Field`] with the path
            /// of the field that is unknown, missing, or of the wrong type.
            pub fn from_json(document: &Value) -> Result<Self, ApiError> {
                let text = |field: &str| {
                    document.get(field).and_then(Value::as_str).unwrap_or_default()
                };
                if text("apiVersion") != API_VERSION {
                    return Err(ApiError::ApiVersion(text("apiVersion").into()));
                }
                let kind = Kind::ALL.into_iter().find(|kind| kind.as_str() == text("kind"));
                match kind {
                    None => Err(ApiError::Kind(text("kind").into())),
                    $(Some(Kind::$type) => typed::<$type>(document).map(Self::$type),)*
                }
            }
        }
    };
}

resources!(
    Host,
    Disk,
    Network,
    PortForward,
    SecurityGroup,
    Service,
    VirtualMachine
);

fn typed<T: Resource>(document: &Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(document).map_err(|error| {
        let name = document
            .pointer("/metadata/name")
            .and_then(Value::as_str)
            .unwrap_or("?");
        ApiError::Field {
            object: format!("{}/{name}", T::KIND),
            error: FieldError::new(error.path().to_string(), error.inner().to_string()),
        }
    })
}

/// Checks that a path can be used whatever the reader's working directory is.
pub(crate) fn absolute_path(field: &str, path: &Path, errors: &mut Vec<FieldError>) {
    if !path.is_absolute() {
        errors.push(FieldError::new(
            field,
            format!("{} is not absolute; start it with /", path.display()),
        ));
    }
    if path.as_os_str().len() >= PATH_LIMIT {
        errors.push(FieldError::new(
            field,
            format!("is longer than {PATH_LIMIT} bytes"),
        ));
    }
    if path
        .components()
        .any(|component| component == Component::ParentDir)
    {
        errors.push(FieldError::new(
            field,
            format!("{} goes up by ..; write the path itself", path.display()),
        ));
    }
}
