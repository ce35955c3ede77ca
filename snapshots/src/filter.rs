//! containerd's filter language, as its clients send it with `List`.
//!
//! ```text
//! filter    := "" | selector ("," selector)*            all selectors must hold
//! selector  := fieldpath [operator value]               without operator: the field is there
//! fieldpath := field ("." field)*
//! field     := quoted | [A-Za-z0-9_-]+
//! operator  := "==" | "!=" | "~="                       equal, not equal, matches a regular expression
//! value     := quoted | anything up to a space or a comma
//! quoted    := '"' ... '"', and behind ~= also '/' ... '/' and '|' ... '|', with the escapes of Go's strings
//! ```
//!
//! Space between these is passed over. A field that is not there equals nothing and matches as an empty text. Of several
//! filters one must hold; no filters hold always. containerd lets a broken regular expression match nothing; here it is
//! refused, so that its author learns of it.
//!
//! Filters come from whoever may talk to containerd, so their size is bounded, and so is a regular expression once it is
//! compiled; matching takes time linear in the text.

use regex_automata::meta::Regex;

mod scanner;

use scanner::{Scanner, Token};

/// Longest filter in bytes.
pub const MAX_FILTER_BYTES: usize = 64 << 10;
/// Most selectors over all filters of a request.
pub const MAX_SELECTORS: usize = 256;
/// Most bytes that a regular expression takes once it is compiled.
const MAX_REGEX_BYTES: usize = 1 << 20;

/// Why a filter was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("filter, byte {position}: {what}")]
pub struct FilterError {
    /// Where in the filter.
    pub position: usize,
    /// What is wrong there.
    pub what: String,
}

/// Which snapshots are meant.
#[derive(Debug, Clone)]
pub struct Filter {
    /// One of these must hold, if there are any.
    any: Vec<Vec<Selector>>,
}

#[derive(Debug, Clone)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Box<Regex>),
}

impl Filter {
    /// From the filters of a request.
    ///
    /// # Errors
    /// The first fault, or a limit that is passed.
    pub fn parse<T: AsRef<str>>(filters: &[T]) -> Result<Self, FilterError> {
        let mut left = MAX_SELECTORS;
        let any = filters.iter().map(|filter| parse(filter.as_ref(), &mut left)).collect::<Result<_, _>>()?;
        Ok(Self { any })
    }

    /// Whether it holds for something whose fields `value` looks up by their paths.
    pub fn matches<'a>(&self, value: impl Fn(&[String]) -> Option<&'a str>) -> bool {
        let holds = |selector: &Selector| selector.test.holds(value(&selector.path));
        self.any.is_empty() || self.any.iter().any(|all| all.iter().all(holds))
    }
}

impl Test {
    fn holds(&self, value: Option<&str>) -> bool {
        match self {
            Self::Present => value.is_some(),
            Self::Equal(wanted) => value == Some(wanted),
            Self::NotEqual(unwanted) => value.unwrap_or_default() != unwanted,
            Self::Matches(regex) => regex.is_match(value.unwrap_or_default()),
        }
    }
}

/// One filter. `left` is how many selectors the request may still have.
fn parse(text: &str, left: &mut usize) -> Result<Vec<Selector>, FilterError> {
    if text.len() > MAX_FILTER_BYTES {
        return Err(error(MAX_FILTER_BYTES, "it is too long"));
    }
    let mut selectors = Vec::new();
    if text.is_empty() {
        return Ok(selectors);
    }
    let mut scanner = Scanner::new(text);
    loop {
        *left = left.checked_sub(1).ok_or_else(|| error(scanner.position(), "there are too many selectors"))?;
        let (selector, next) = selector(&mut scanner)?;
        selectors.push(selector);
        match next {
            (_, Token::Comma) => {}
            (_, Token::End) => return Ok(selectors),
            (position, _) => return Err(error(position, "expected a comma or the end")),
        }
    }
}

type Positioned = (usize, Token);

/// One selector, and what follows it.
fn selector(scanner: &mut Scanner<'_>) -> Result<(Selector, Positioned), FilterError> {
    let (path, next) = fieldpath(scanner)?;
    let (position, operator) = match next {
        (position, Token::Operator(operator)) => (position, operator),
        next => return Ok((Selector { path, test: Test::Present }, next)),
    };
    let (at, value) = scanner.value()?;
    let plain = |value| match value {
        Token::Word(text) | Token::Quoted { quote: '"', text } => Ok(text),
        Token::Quoted { .. } => Err(error(at, "this kind of quote belongs behind ~=")),
        _ => Err(error(at, "expected a value")),
    };
    let test = match operator.as_str() {
        "==" => Test::Equal(plain(value)?),
        "!=" => Test::NotEqual(plain(value)?),
        "~=" => match value {
            Token::Word(text) | Token::Quoted { text, .. } => Test::Matches(regex(at, &text)?),
            _ => return Err(error(at, "expected a regular expression")),
        },
        _ => return Err(error(position, "there are the operators ==, != and ~=")),
    };
    Ok((Selector { path, test }, scanner.next()?))
}

/// A field path, and what follows it.
fn fieldpath(scanner: &mut Scanner<'_>) -> Result<(Vec<String>, Positioned), FilterError> {
    let mut path = Vec::new();
    loop {
        match scanner.next()? {
            (_, Token::Word(field) | Token::Quoted { quote: '"', text: field }) => path.push(field),
            (position, _) => return Err(error(position, "expected a field")),
        }
        match scanner.next()? {
            (_, Token::Dot) => {}
            next => return Ok((path, next)),
        }
    }
}

fn regex(position: usize, text: &str) -> Result<Box<Regex>, FilterError> {
    let config = Regex::config().nfa_size_limit(Some(MAX_REGEX_BYTES)).onepass_size_limit(Some(MAX_REGEX_BYTES));
    let built = Regex::builder().configure(config).build(text);
    built.map(Box::new).map_err(|e| error(position, format!("regular expression: {e}")))
}

fn error(position: usize, what: impl Into<String>) -> FilterError {
    FilterError { position, what: what.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the filters hold for `name` "app", a label `a.b` of "x", and a label `empty`.
    fn holds(filters: &[&str]) -> Result<bool, FilterError> {
        let look_up = |path: &[String]| match path.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["name"] => Some("app"),
            ["labels", "a.b"] | ["labels", "a", "b"] => Some("x"),
            ["labels", "empty"] => Some(""),
            _ => None,
        };
        Filter::parse(filters).map(|filter| filter.matches(look_up))
    }

    #[test]
    fn all_selectors_of_one_filter_must_hold() {
        for (filters, expected) in [
            (&[][..], true),
            (&[""], true),
            (&["name"], true),
            (&["nothing"], false),
            (&["labels.empty"], true),
            (&["labels.nothing"], false),
            (&["name==app"], true),
            (&["name == \"app\" , labels.\"a.b\"==x"], true),
            (&["labels.a.b==x"], true),
            (&["labels.a.b==\"\\x78\""], true),
            (&["name==app,labels.a.b==y"], false),
            (&["name==other", "labels.a.b==x"], true),
            (&["name==other", "labels.a.b==y"], false),
            (&["name!=other"], true),
            (&["nothing!=x"], true),
            (&["nothing!=\"\""], false),
            (&["name~=^a"], true),
            (&["name~=/a.{2}/"], true),
            (&["name~=|^p|"], false),
            (&["nothing~=^$"], true),
        ] {
            assert_eq!(holds(filters), Ok(expected), "{filters:?}");
        }
    }

    #[test]
    fn what_containerd_asks_after_a_layer_was_found() {
        let filter = "labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"default/1/sha256:cd\"";
        let parsed = Filter::parse(&[filter]).unwrap();
        let matches = |reference: &'static str, parent: &'static str| {
            parsed.matches(|path| match path {
                [labels, key] if labels == "labels" && key == "containerd.io/snapshot.ref" => Some(reference),
                [field] if field == "parent" => Some(parent),
                _ => None,
            })
        };
        assert!(matches("sha256:ab", "default/1/sha256:cd"));
        assert!(!matches("sha256:ab", "") && !matches("sha256:a", "default/1/sha256:cd"));
    }

    #[test]
    fn faults_are_refused_with_their_place() {
        for (filter, position) in [
            (" ", 1),
            (",", 0),
            ("name,", 5),
            ("name==", 6),
            ("name=app", 4),
            ("name===app", 4),
            ("name==app other", 10),
            ("name.", 5),
            (".name", 0),
            ("name/x", 4),
            ("/name/==x", 0),
            ("name==/x/", 6),
            ("name==\"x", 6),
            ("name==\"\\q\"", 6),
            ("name==\"\\xff\"", 6),
            ("name==\"\\ud800\"", 6),
            ("name==\u{1}", 6),
            ("name~=(", 6),
            ("name~=a{1000}{1000}{1000}", 6),
            ("n\u{e4}me", 1),
        ] {
            let found = holds(&[filter]).map_err(|error| error.position);
            assert_eq!(found, Err(position), "{filter:?}");
        }
    }

    #[test]
    fn requests_are_bounded() {
        let many = vec!["name"; MAX_SELECTORS];
        assert_eq!(holds(&[&many.join(",")]), Ok(true));
        assert_eq!(holds(&many), Ok(true));
        assert!(holds(&[&many.join(","), "name"]).is_err());
        assert!(holds(&[&format!("name==\"{}\"", "x".repeat(MAX_FILTER_BYTES))]).is_err());
    }
}
