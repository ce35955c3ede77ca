//! What to read early, as people and traces say it: paths, patterns, chunks of files.
//!
//! A list has a path on each line, from the root, with or without the slash in front of it. In a name `*` stands for any
//! bytes, `?` for one byte, and a backslash makes an ordinary byte of what follows. A directory means all that is below
//! it. A [trace](crate::Trace) has its own form: chunks of files, and no patterns.

use std::io::{self, Read};

use crate::layout::MAX_NAME;
use crate::trace;

/// Most bytes of a list: a million paths.
const MAX_LIST: u64 = 64 << 20;

/// Why a list cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PrefetchListError {
    /// It could not be read.
    #[error("cannot read the list")]
    Read(#[from] io::Error),
    /// It is too long.
    #[error("the list has more than {MAX_LIST} bytes")]
    TooLarge,
    /// A line says nothing that is understood.
    #[error("line {line}: {problem}")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
}

/// Files and directories of an image in the order in which they shall be read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PrefetchList {
    hints: Vec<Hint>,
}

/// One line of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hint {
    /// The names on the way from the root; none for the root itself.
    pub(crate) names: Vec<Name>,
    /// The chunk of the file that is meant, if not all.
    pub(crate) chunk: Option<u64>,
}

/// A name, or what matches some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Name {
    Exact(Vec<u8>),
    Pattern(Vec<Token>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Token {
    Byte(u8),
    AnyByte,
    AnyBytes,
}

impl PrefetchList {
    /// Reads a list of paths and patterns. Empty lines mean nothing.
    pub fn paths(input: impl Read) -> Result<Self, PrefetchListError> {
        Self::read(input, |line| Ok(Hint { names: pattern(line)?, chunk: None }))
    }

    /// Reads a trace.
    pub fn trace(input: impl Read) -> Result<Self, PrefetchListError> {
        Self::read(input, |line| {
            let (chunk, path) = trace::parse_line(line)?;
            let names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty());
            let names = names.map(|name| check(Name::Exact(name.to_vec()), name.len())).collect::<Result<_, _>>()?;
            Ok(Hint { names, chunk: Some(chunk) })
        })
    }

    /// Exactly these paths.
    pub(crate) fn exact<'a>(paths: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let names = |path: &[u8]| {
            let names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty());
            names.map(|name| Name::Exact(name.to_vec())).collect()
        };
        Self { hints: paths.into_iter().map(|path| Hint { names: names(path), chunk: None }).collect() }
    }

    /// Whether it asks for nothing.
    pub fn is_empty(&self) -> bool {
        self.hints.is_empty()
    }

    pub(crate) fn hints(&self) -> &[Hint] {
        &self.hints
    }

    fn read(input: impl Read, hint: impl Fn(&[u8]) -> Result<Hint, String>) -> Result<Self, PrefetchListError> {
        Ok(Self { hints: lines(input, hint)? })
    }
}

/// What the lines of a list mean; empty ones mean nothing.
pub(crate) fn lines<T>(
    input: impl Read,
    meaning: impl Fn(&[u8]) -> Result<T, String>,
) -> Result<Vec<T>, PrefetchListError> {
    let mut bytes = Vec::new();
    input.take(MAX_LIST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_LIST {
        return Err(PrefetchListError::TooLarge);
    }
    let lines = (1..).zip(bytes.split(|byte| *byte == b'\n')).filter(|(_, line)| !line.is_empty());
    lines.map(|(line, text)| meaning(text).map_err(|problem| PrefetchListError::Line { line, problem })).collect()
}

impl Name {
    /// Whether a name of a directory is meant.
    pub(crate) fn matches(&self, name: &[u8]) -> bool {
        match self {
            Self::Exact(exact) => exact == name,
            Self::Pattern(tokens) => matches(tokens, name),
        }
    }
}

impl std::fmt::Display for Hint {
    /// The path as it was given, apart from escapes.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for name in &self.names {
            let bytes: Vec<u8> = match name {
                Name::Exact(bytes) => bytes.clone(),
                Name::Pattern(tokens) => tokens.iter().map(|token| token.byte()).collect(),
            };
            write!(f, "/{}", String::from_utf8_lossy(&bytes))?;
        }
        if self.names.is_empty() { f.write_str("/") } else { Ok(()) }
    }
}

impl Token {
    fn byte(self) -> u8 {
        match self {
            Self::Byte(byte) => byte,
            Self::AnyByte => b'?',
            Self::AnyBytes => b'*',
        }
    }
}

/// The names of a path with patterns.
fn pattern(line: &[u8]) -> Result<Vec<Name>, String> {
    let mut names = vec![Vec::new()];
    let mut bytes = line.iter().copied();
    while let Some(byte) = bytes.next() {
        let token = match byte {
            b'/' => {
                names.push(Vec::new());
                continue;
            }
            b'*' => Token::AnyBytes,
            b'?' => Token::AnyByte,
            b'\\' => Token::Byte(bytes.next().ok_or("a backslash at its end")?),
            byte => Token::Byte(byte),
        };
        if let Some(name) = names.last_mut() {
            name.push(token);
        }
    }
    let names = names.into_iter().filter(|name| !name.is_empty() && name != &[Token::Byte(b'.')]);
    names.map(|tokens| check(name(&tokens), tokens.len())).collect()
}

fn name(tokens: &[Token]) -> Name {
    match tokens.iter().all(|token| matches!(token, Token::Byte(_))) {
        true => Name::Exact(tokens.iter().map(|token| token.byte()).collect()),
        false => Name::Pattern(tokens.to_vec()),
    }
}

fn check(name: Name, len: usize) -> Result<Name, String> {
    if len > MAX_NAME {
        return Err(format!("a name of {len} bytes, at most {MAX_NAME} are possible"));
    }
    if name == Name::Exact(b"..".to_vec()) {
        return Err("a path that leads up".into());
    }
    Ok(name)
}

/// Goes back to the last `*` only: what an earlier one could match, the last one can. So the time is at most that of both
/// lengths multiplied.
fn matches(tokens: &[Token], name: &[u8]) -> bool {
    let (mut token, mut byte) = (0, 0);
    let mut last: Option<(usize, usize)> = None;
    while byte < name.len() {
        match tokens.get(token) {
            Some(Token::AnyBytes) => {
                last = Some((token, byte));
                token += 1;
                continue;
            }
            Some(Token::AnyByte) => {}
            Some(Token::Byte(expected)) if *expected == name[byte] => {}
            _ => {
                let Some((star, from)) = last else { return false };
                last = Some((star, from + 1));
                (token, byte) = (star + 1, from + 1);
                continue;
            }
        }
        token += 1;
        byte += 1;
    }
    tokens[token..].iter().all(|token| *token == Token::AnyBytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(text: &str) -> PrefetchList {
        PrefetchList::paths(text.as_bytes()).unwrap()
    }

    #[test]
    fn paths_are_read_with_and_without_a_slash() {
        assert_eq!(list("/a/b\n\n"), list("a//b/"));
        assert_eq!(list("./a"), list("/a"));
        assert_eq!(list("/").hints()[0].names, []);
        assert_eq!(list("/a\\*b").hints()[0].names, [Name::Exact(b"a*b".to_vec())]);
        assert_eq!(list("/usr/l*/?").hints()[0].to_string(), "/usr/l*/?");
        assert_eq!(list("/").hints()[0].to_string(), "/");
        for (text, line) in [("ok\n/a/../b", 2), ("a\\", 1), (&"x".repeat(256), 1)] {
            let error = PrefetchList::paths(text.as_bytes()).unwrap_err();
            assert!(matches!(error, PrefetchListError::Line { line: found, .. } if found == line), "{error}");
        }
        let error = PrefetchList::paths(io::repeat(b'/')).unwrap_err();
        assert!(matches!(error, PrefetchListError::TooLarge));
    }

    #[test]
    fn traces_are_read() {
        let trace = PrefetchList::trace(&b"3\t/a/odd\\n\\\\name\n0\t/b*\n"[..]).unwrap();
        let found: Vec<_> = trace.hints().iter().map(|hint| (hint.chunk, hint.names.last().cloned())).collect();
        let exact = |name: &[u8]| Some(Name::Exact(name.to_vec()));
        assert_eq!(found, [(Some(3), exact(b"odd\n\\name")), (Some(0), exact(b"b*"))]);
        for wrong in ["/a", "x\t/a", "1\t/\\x", "1\t/a\\", "-1\t/a", "1\t/../a"] {
            assert!(PrefetchList::trace(wrong.as_bytes()).is_err(), "{wrong:?}");
        }
    }

    /// As slow as it is plain.
    fn model(tokens: &[Token], name: &[u8]) -> bool {
        match tokens.split_first() {
            None => name.is_empty(),
            Some((Token::AnyBytes, rest)) => (0..=name.len()).any(|skip| model(rest, &name[skip..])),
            Some((token, rest)) => match name.split_first() {
                Some((byte, name)) => (*token == Token::AnyByte || *token == Token::Byte(*byte)) && model(rest, name),
                None => false,
            },
        }
    }

    proptest! {
        #[test]
        fn patterns_match_as_the_model_says(
            tokens in prop::collection::vec(prop_oneof![
                2 => prop::sample::select(vec![b'a', b'b']).prop_map(Token::Byte),
                1 => Just(Token::AnyByte),
                1 => Just(Token::AnyBytes),
            ], 0..8),
            name in prop::collection::vec(prop::sample::select(vec![b'a', b'b']), 0..10),
        ) {
            prop_assert_eq!(matches(&tokens, &name), model(&tokens, &name));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count();
            for list in [PrefetchList::paths(&bytes[..]), PrefetchList::trace(&bytes[..])].into_iter().flatten() {
                prop_assert_eq!(list.hints().len(), lines);
            }
        }
    }
}
