//! What is kept, and the answer to each request: no socket and no descriptor is needed to decide it. Events and their answers
//! are not here, but in [`Pending`](crate::Pending).

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};

use crate::message::{Mount, Reply, Request};

/// Most mounts that are kept: a descriptor each.
pub const MAX_MOUNTS: usize = 4096;

/// The kept mounts, each with its connection `C`, and the group of events that is held.
#[derive(Debug)]
pub struct Table<C> {
    kept: BTreeMap<String, (Mount, C)>,
    group: Option<C>,
    stopped: bool,
}

impl<C> Default for Table<C> {
    fn default() -> Self {
        Self { kept: BTreeMap::new(), group: None, stopped: false }
    }
}

impl<C> Table<C> {
    /// Carries a request out that came with `connection`, and gives the answer with the connection that goes along.
    pub fn answer(&mut self, request: Request, connection: Option<C>) -> (Reply, Option<&C>) {
        match (request, connection) {
            (Request::Keep(mount), Some(connection)) => (self.keep(mount, connection), None),
            (Request::Keep(_), None) => (refused("no connection came with the mount"), None),
            (Request::Next { after }, _) => {
                let after = if after.is_empty() { Unbounded } else { Excluded(after) };
                match self.kept.range((after, Unbounded)).next() {
                    Some((_, (mount, connection))) => (Reply::Kept(mount.clone()), Some(connection)),
                    None => (Reply::End, None),
                }
            }
            (Request::Forget { device }, _) => {
                self.kept.remove(&device);
                (Reply::Done, None)
            }
            (Request::Guard, None) => (refused("no group came to be guarded"), None),
            (Request::Guard, Some(_)) if self.group.is_some() => (refused("a group is guarded already"), None),
            (Request::Guard, group) => {
                self.group = group;
                (Reply::Done, None)
            }
            (Request::Group, _) => match &self.group {
                Some(group) => (Reply::Group, Some(group)),
                None => (Reply::End, None),
            },
            (Request::Release, _) => {
                self.group = None;
                (Reply::Done, None)
            }
            (Request::Take, _) if self.group.is_some() => (Reply::Done, None),
            (Request::Take, _) => (refused("no group is guarded"), None),
            (Request::Answer { .. }, _) => (refused("nobody has been told of events over this connection"), None),
            (Request::Stop, _) if self.group.is_some() => (refused("a group of events is guarded"), None),
            (Request::Stop, _) if self.kept.is_empty() => {
                self.stopped = true;
                (Reply::Done, None)
            }
            (Request::Stop, _) => (refused(&format!("{} mounts are kept", self.kept.len())), None),
        }
    }

    fn keep(&mut self, mount: Mount, connection: C) -> Reply {
        if self.kept.len() >= MAX_MOUNTS && !self.kept.contains_key(&mount.device) {
            return refused(&format!("{MAX_MOUNTS} mounts are kept, which is the most"));
        }
        self.kept.insert(mount.device.clone(), (mount, connection));
        Reply::Done
    }

    /// The group that is held.
    pub fn group(&self) -> Option<&C> {
        self.group.as_ref()
    }

    /// Lets all mounts go; gives how many there were.
    pub fn let_go(&mut self) -> usize {
        std::mem::take(&mut self.kept).len()
    }

    /// How many mounts are kept.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether nothing is.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Whether it was asked to stop, and could.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }
}

fn refused(reason: &str) -> Reply {
    Reply::Refused { reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn mount(device: u8) -> Mount {
        Mount { device: device.to_string(), mountpoint: format!("/{device}").into(), record: vec![device] }
    }

    proptest! {
        /// The model: a list of pairs, in any order.
        #[test]
        fn keeps_what_a_list_would(steps in vec((0..4u8, 0..12u8), 0..60)) {
            let (mut table, mut model) = (Table::default(), Vec::<(u8, usize)>::new());
            for (number, (step, device)) in steps.into_iter().enumerate() {
                match step {
                    0 | 1 => {
                        prop_assert_eq!(table.answer(Request::Keep(mount(device)), Some(number)).0, Reply::Done);
                        model.retain(|(kept, _)| *kept != device);
                        model.push((device, number));
                    }
                    2 => {
                        table.answer(Request::Forget { device: device.to_string() }, None);
                        model.retain(|(kept, _)| *kept != device);
                    }
                    _ => {
                        let could = table.answer(Request::Stop, None).0 == Reply::Done;
                        prop_assert_eq!(could, model.is_empty());
                    }
                }
                prop_assert_eq!(table.len(), model.len());
            }
            model.sort_by_key(|(device, _)| device.to_string());
            let mut after = String::new();
            for (device, connection) in model {
                let (reply, found) = table.answer(Request::Next { after }, None);
                prop_assert_eq!((reply, found), (Reply::Kept(mount(device)), Some(&connection)));
                after = device.to_string();
            }
            prop_assert_eq!(table.answer(Request::Next { after }, None), (Reply::End, None));
        }
    }

    #[test]
    fn refuses_what_has_no_connection_and_more_than_it_can_hold() {
        let mut table = Table::default();
        assert!(matches!(table.answer(Request::Keep(mount(1)), None).0, Reply::Refused { .. }));
        let numbered = |number: usize| Mount { device: number.to_string(), ..mount(0) };
        for number in 0..MAX_MOUNTS {
            assert_eq!(table.answer(Request::Keep(numbered(number)), Some(())).0, Reply::Done);
        }
        assert!(matches!(table.answer(Request::Keep(numbered(MAX_MOUNTS)), Some(())).0, Reply::Refused { .. }));
        assert_eq!(table.answer(Request::Keep(numbered(7)), Some(())).0, Reply::Done, "in the place of another");
        assert!(!table.is_stopped());
        assert_eq!((table.let_go(), table.len()), (MAX_MOUNTS, 0));
    }

    #[test]
    fn there_is_one_group_and_it_is_not_let_go_by_the_way() {
        let mut table = Table::default();
        let refuses = |table: &mut Table<u8>, request, group| {
            matches!(table.answer(request, group), (Reply::Refused { .. }, None))
        };
        assert_eq!(table.answer(Request::Group, None), (Reply::End, None));
        assert!(refuses(&mut table, Request::Guard, None) && refuses(&mut table, Request::Take, None));
        assert_eq!(table.answer(Request::Guard, Some(7)), (Reply::Done, None));
        assert!(refuses(&mut table, Request::Guard, Some(8)) && refuses(&mut table, Request::Stop, None));
        assert!(refuses(&mut table, Request::Answer { id: 1, allow: true }, None));
        assert_eq!(table.answer(Request::Group, None), (Reply::Group, Some(&7)));
        assert_eq!(table.answer(Request::Take, None), (Reply::Done, None));
        assert_eq!(table.answer(Request::Release, None), (Reply::Done, None));
        assert_eq!(table.group(), None);
        assert_eq!(table.answer(Request::Stop, None), (Reply::Done, None));
    }
}
