//! What credential helpers have said, which is good for a while: a helper is not asked for every request.
//!
//! Pure: who asks them is [`Keyring`](super::Keyring).

use std::{
    num::NonZeroUsize,
    time::{Duration, Instant},
};

use lru::LruCache;

use super::{Authfile, AuthfileError, Credentials, server};
use crate::oci::Source;

/// Most registries whose answers are kept; those that were asked for longest ago are forgotten first.
const MAX_REGISTRIES: NonZeroUsize = NonZeroUsize::new(256).expect("not 0");
/// How long an answer is used. Helpers of clouds give passwords that are good for an hour and more.
const GOOD_FOR: Duration = Duration::from_secs(600);
/// How long a helper is left alone that has failed, or whose answer a registry has refused.
const ASK_AGAIN: Duration = Duration::from_secs(30);

/// Answers by registry.
pub(super) struct Answers(LruCache<String, Answer>);

struct Answer {
    /// Whose it is: another auth file may name another.
    helper: String,
    asked: Instant,
    /// Nothing where the helper has nothing, and what went wrong where it gave no answer.
    given: Result<Option<Credentials>, String>,
    refused: bool,
}

impl Answer {
    fn is_current(&self, helper: &str, now: Instant) -> bool {
        let lifetime = if self.refused || self.given.is_err() { ASK_AGAIN } else { GOOD_FOR };
        self.helper == helper && now < self.asked + lifetime
    }
}

impl Default for Answers {
    fn default() -> Self {
        Self(LruCache::sparse(MAX_REGISTRIES))
    }
}

impl Answers {
    /// The helper that is to be asked for credentials for `source`, and what it knows the registry by. `None` where there is
    /// none, or its answer is there.
    ///
    /// # Errors
    /// That it has failed, and is not to be asked again yet.
    pub(super) fn wanted(
        &mut self,
        file: &Authfile,
        source: &Source,
        now: Instant,
    ) -> Result<Option<(String, String)>, AuthfileError> {
        let Some(helper) = file.helper(source) else { return Ok(None) };
        match self
            .0
            .get(source.registry())
            .filter(|answer| answer.is_current(helper, now))
            .map(|answer| &answer.given)
        {
            None => Ok(Some((helper.to_owned(), server(source.registry()).to_owned()))),
            Some(Ok(_)) => Ok(None),
            Some(Err(reason)) => {
                let (helper, reason) = (helper.chars().take(60).collect(), reason.clone());
                Err(AuthfileError::Helper { helper, registry: source.registry().to_owned(), reason })
            }
        }
    }

    /// Notes what a helper has said.
    pub(super) fn note(
        &mut self,
        source: &Source,
        helper: String,
        given: Result<Option<Credentials>, String>,
        now: Instant,
    ) {
        self.0.put(source.registry().to_owned(), Answer { helper, asked: now, given, refused: false });
    }

    /// What there is for `source`: from the file or, where that has nothing, from its helper.
    pub(super) fn find(&self, file: &Authfile, source: &Source, now: Instant) -> Option<Credentials> {
        let Some(helper) = file.helper(source) else { return file.find(source).cloned() };
        let answer = self.0.peek(source.registry()).filter(|answer| answer.is_current(helper, now))?;
        answer.given.as_ref().ok()?.clone()
    }

    /// A registry did not take these: its helper may know better by now.
    pub(super) fn refused(&mut self, source: &Source, credentials: &Credentials) {
        let answer = self.0.peek_mut(source.registry());
        if let Some(answer) =
            answer.filter(|answer| answer.given.as_ref().is_ok_and(|given| given.as_ref() == Some(credentials)))
        {
            answer.refused = true;
        }
    }

    /// Forgets all of them.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str) -> Credentials {
        Credentials { username: name.to_owned(), password: "correct horse".to_owned() }
    }

    fn source(registry: &str) -> Source {
        Source::new(registry, "team/app").unwrap()
    }

    fn file(text: &str) -> Authfile {
        Authfile::parse(text.as_bytes(), "auth.json").unwrap()
    }

    #[test]
    fn whose_helper_is_asked_and_what_for() {
        let text = r#"{"auths": {"own.io": {"username": "a", "password": "b"}, "empty.io": {}},
            "credHelpers": {"https://Helped.io": "one", "own.io": "one"}, "credsStore": "all"}"#;
        let (file, mut answers, now) = (file(text), Answers::default(), Instant::now());
        let mut wanted = |registry| answers.wanted(&file, &source(registry), now).unwrap();
        let pair = |helper: &str, registry: &str| Some((helper.to_owned(), registry.to_owned()));
        assert_eq!(wanted("own.io"), None);
        assert_eq!(wanted("helped.io"), pair("one", "helped.io"));
        assert_eq!(wanted("empty.io"), pair("all", "empty.io"));
        assert_eq!(wanted("docker.io"), pair("all", "https://index.docker.io/v1/"));
        assert_eq!(Answers::default().wanted(&Authfile::default(), &source("h.io"), now).unwrap(), None);
    }

    #[test]
    fn answers_are_good_for_a_while() {
        let (file, mut answers, start) = (file(r#"{"credsStore": "one"}"#), Answers::default(), Instant::now());
        let h = source("h.io");
        let asks =
            |answers: &mut Answers, after| answers.wanted(&file, &h, start + after).map(|wanted| wanted.is_some());
        let second = Duration::from_secs(1);
        assert!(asks(&mut answers, Duration::ZERO).unwrap());
        answers.note(&h, "one".to_owned(), Ok(Some(user("a"))), start);
        assert!(!asks(&mut answers, GOOD_FOR - second).unwrap());
        assert_eq!(answers.find(&file, &h, start + GOOD_FOR - second), Some(user("a")));
        assert!(asks(&mut answers, GOOD_FOR).unwrap());
        assert_eq!(answers.find(&file, &h, start + GOOD_FOR), None);
        // What was refused is asked for again soon, but not at once. What somebody else has shown is another thing.
        answers.refused(&h, &user("b"));
        assert!(!asks(&mut answers, ASK_AGAIN).unwrap());
        answers.refused(&h, &user("a"));
        assert!(!asks(&mut answers, ASK_AGAIN - second).unwrap());
        assert!(asks(&mut answers, ASK_AGAIN).unwrap());
        // So is one that fails; what it has said is told, and by nobody else's name.
        answers.note(&h, "one".to_owned(), Err("it fails".to_owned()), start);
        let error = asks(&mut answers, ASK_AGAIN - second).unwrap_err().to_string();
        assert!(error.contains("\"one\" for h.io: it fails"), "{error}");
        assert!(asks(&mut answers, ASK_AGAIN).unwrap());
        // One that has nothing is asked as rarely as one that has.
        answers.note(&h, "one".to_owned(), Ok(None), start);
        assert!(!asks(&mut answers, GOOD_FOR - second).unwrap());
    }

    #[test]
    fn another_file_does_not_use_what_a_helper_of_the_first_has_said() {
        let (mut answers, now) = (Answers::default(), Instant::now());
        answers.note(&source("h.io"), "one".to_owned(), Ok(Some(user("a"))), now);
        let other = file(r#"{"credHelpers": {"h.io": "two"}}"#);
        assert_eq!(answers.find(&other, &source("h.io"), now), None);
        assert!(answers.wanted(&other, &source("h.io"), now).unwrap().is_some());
        assert_eq!(answers.find(&Authfile::default(), &source("h.io"), now), None);
    }
}
