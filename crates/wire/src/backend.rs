//! Requests of the back-end, on the channel that SET_BACKEND_REQ_FD opened.
//!
//! Ids and payloads: `docs/interop/vhost-user.rst`, "Back-end message types".

use crate::bytes::Reader;
use crate::header::frame;
use crate::payload::{FdSlot, HostNotifierArea, IotlbMessage, SharedObjectId, VringState, at_most_one_fd, no_fds};
use crate::{Channel, Error, Header, HeaderFlags};

/// A back-end request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendRequest {
    /// An IOTLB miss or access failure.
    Iotlb(IotlbMessage),
    /// The configuration space changed: read it again.
    ConfigChange,
    /// Map (or drop) a doorbell area for a ring.
    VringHostNotifier {
        /// What to map.
        area: HostNotifierArea,
        /// The memory; none to drop it.
        fd: Option<FdSlot>,
    },
    /// In-band call.
    VringCall(VringState),
    /// In-band error.
    VringErr(VringState),
    /// A shared object was added.
    SharedObjectAdd(SharedObjectId),
    /// A shared object was removed.
    SharedObjectRemove(SharedObjectId),
    /// A shared object is asked for.
    SharedObjectLookup(SharedObjectId),
}

impl BackendRequest {
    /// Request id.
    #[must_use]
    pub fn id(&self) -> u32 {
        match self {
            BackendRequest::Iotlb(_) => 1,
            BackendRequest::ConfigChange => 2,
            BackendRequest::VringHostNotifier { .. } => 3,
            BackendRequest::VringCall(_) => 4,
            BackendRequest::VringErr(_) => 5,
            BackendRequest::SharedObjectAdd(_) => 6,
            BackendRequest::SharedObjectRemove(_) => 7,
            BackendRequest::SharedObjectLookup(_) => 8,
        }
    }

    /// The specification's name of a request id, without its prefix.
    #[must_use]
    pub fn name_of(id: u32) -> Option<&'static str> {
        Some(match id {
            1 => "BACKEND_IOTLB_MSG",
            2 => "BACKEND_CONFIG_CHANGE_MSG",
            3 => "BACKEND_VRING_HOST_NOTIFIER_MSG",
            4 => "BACKEND_VRING_CALL",
            5 => "BACKEND_VRING_ERR",
            6 => "BACKEND_SHARED_OBJECT_ADD",
            7 => "BACKEND_SHARED_OBJECT_REMOVE",
            8 => "BACKEND_SHARED_OBJECT_LOOKUP",
            _ => return None,
        })
    }

    /// Decodes a request.
    ///
    /// # Errors
    /// As [`crate::Request::decode`].
    pub fn decode(header: &Header, payload: &[u8], fds: &[FdSlot]) -> Result<Self, Error> {
        let name = Self::name_of(header.request)
            .ok_or(Error::UnknownRequest { request: header.request, channel: Channel::Back })?;
        if header.is_reply() {
            return Err(Error::Direction { request: name, expected: false, found: true });
        }
        if header.request != 3 {
            no_fds(name, fds)?;
        }
        Ok(match header.request {
            1 => BackendRequest::Iotlb(IotlbMessage::decode(name, payload)?),
            2 => Reader::exactly(name, payload, 0).map(|_| BackendRequest::ConfigChange)?,
            3 => BackendRequest::VringHostNotifier {
                area: HostNotifierArea::decode(name, payload)?,
                fd: at_most_one_fd(name, fds)?,
            },
            4 => BackendRequest::VringCall(VringState::decode(name, payload)?),
            5 => BackendRequest::VringErr(VringState::decode(name, payload)?),
            6 => BackendRequest::SharedObjectAdd(SharedObjectId::decode(name, payload)?),
            7 => BackendRequest::SharedObjectRemove(SharedObjectId::decode(name, payload)?),
            _ => BackendRequest::SharedObjectLookup(SharedObjectId::decode(name, payload)?),
        })
    }

    /// Appends the message to `out` and its descriptors to `fds`.
    pub fn encode(&self, flags: HeaderFlags, out: &mut Vec<u8>, fds: &mut Vec<FdSlot>) {
        frame(out, self.id(), flags, |out| match self {
            BackendRequest::Iotlb(message) => message.encode(out),
            BackendRequest::ConfigChange => {}
            BackendRequest::VringHostNotifier { area, .. } => area.encode(out),
            BackendRequest::VringCall(state) | BackendRequest::VringErr(state) => state.encode(out),
            BackendRequest::SharedObjectAdd(id)
            | BackendRequest::SharedObjectRemove(id)
            | BackendRequest::SharedObjectLookup(id) => out.extend_from_slice(&id.0),
        });
        if let BackendRequest::VringHostNotifier { fd, .. } = self {
            fds.extend(fd);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_has_a_name_of_its_own() {
        let names: Vec<&str> = (0..=u32::from(u16::MAX)).filter_map(BackendRequest::name_of).collect();
        let distinct: std::collections::BTreeSet<&&str> =
            names.iter().filter(|it| it.starts_with("BACKEND_")).collect();
        assert_eq!((names.len(), distinct.len()), (8, 8), "{names:?}");
    }
}
